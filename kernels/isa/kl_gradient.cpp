// The gradient of KL(a||b) in every format.
#include "pair/kl_gradient-inl.h"

namespace kl::KL_ISA {

#define X(T)                                                                                           \
    template void kl_gradient_run(const T*, const T*, std::int64_t, double, const RowScalars&, T*, T*, \
                                  bool);                                                               \
    template bool kl_gradient_with_label(const T*, const T*, std::int64_t, double, const RowScalars&,  \
                                         const LabelTerm&, T*, T*, bool);
KL_FORMATS(X)
#undef X

}  // namespace kl::KL_ISA
