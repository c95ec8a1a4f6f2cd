// The value's second sweep, of the formulas beside KL, in every format.
#include "pair/formula_pass-inl.h"

namespace kl::KL_ISA {

template FormulaSums formula_sums_run(const float*, const float*, std::int64_t, double, const RowScalars&);
template FormulaSums formula_sums_run(const Bf16*, const Bf16*, std::int64_t, double, const RowScalars&);
template FormulaSums formula_sums_run(const F16*, const F16*, std::int64_t, double, const RowScalars&);
template FormulaSums formula_sums_run(const double*, const double*, std::int64_t, double, const RowScalars&);

}  // namespace kl::KL_ISA
