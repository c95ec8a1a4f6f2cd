// The gradients of the formulas beside KL in every format.
#include "pair/formula_pass-inl.h"

namespace kl::KL_ISA {

template void formula_gradient_run(const float*, const float*, std::int64_t, double, const RowScalars&,
                                   float*, float*, bool);
template void formula_gradient_run(const Bf16*, const Bf16*, std::int64_t, double, const RowScalars&, Bf16*,
                                   Bf16*, bool);
template void formula_gradient_run(const F16*, const F16*, std::int64_t, double, const RowScalars&, F16*,
                                   F16*, bool);
template void formula_gradient_run(const double*, const double*, std::int64_t, double, const RowScalars&,
                                   double*, double*, bool);

}  // namespace kl::KL_ISA
