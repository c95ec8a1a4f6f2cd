// The gradients of the formulas beside KL in every format.
#include "pair/formula_pass-inl.h"

namespace kl::KL_ISA {

#define X(T)                                                                                                \
    template void formula_gradient_run(const T*, const T*, std::int64_t, double, const RowScalars&, T*, T*, \
                                       bool);
KL_FORMATS(X)
#undef X

}  // namespace kl::KL_ISA
