// The value's second sweep, of the formulas beside KL, in every format.
#include "pair/formula_pass-inl.h"

namespace kl::KL_ISA {

#define X(T) \
    template FormulaSums formula_sums_run(const T*, const T*, std::int64_t, double, const RowScalars&);
KL_FORMATS(X)
#undef X

}  // namespace kl::KL_ISA
