// The table of one instruction set.
#include "isa/entries-inl.h"
#include "testing/probes-inl.h"

#define KL_STRING_(x) #x
#define KL_STRING(x) KL_STRING_(x)

namespace kl::KL_ISA {

extern const Kernels kernels;
const Kernels kernels{
    KL_STRING(KL_ISA), kBlock,           sweep_block,        fallback, has_far_column, formula_sums,
    gradient,          sweep_pair_block, side_result,        logit,    find,           elementary,
    probe_read,        probe_write,      &complement_kernels};

}  // namespace kl::KL_ISA
