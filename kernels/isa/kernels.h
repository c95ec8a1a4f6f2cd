// The kernels of one instruction set, as what is compiled once calls them.
#pragma once

#include "complement/complement.h"
#include "pair/row.h"
#include "token_stats/state.h"

namespace kl {

struct Kernels {
    const char* name;
    std::int64_t block;  // columns of one unit of work
    State (*sweep_block)(const Row&, std::int64_t first, std::int64_t last);
    RowResult (*fallback)(const Row&);
    // Whether r is past kMostR / 2 in any column that both sides have, in fp32.
    bool (*has_far_column)(const Row&, double shift);
    FormulaSums (*formula_sums)(const Row&, const RowScalars&, std::int64_t first, std::int64_t last);
    // Where non_temporal, gradients bypass the cache.
    void (*gradient)(const Row&, const RowScalars&, Destination to_a, Destination to_b, std::int64_t first,
                     std::int64_t last, bool non_temporal, const LabelTerm&);
    PairState (*sweep_pair_block)(const Row&, std::int64_t first, std::int64_t last);
    SideResult (*side)(const void* logits, Dtype, std::int64_t columns, double scale);
    // One logit; and the first of some columns that holds a logit, or -1.
    double (*logit)(const void* logits, Dtype, std::int64_t column);
    std::int64_t (*find)(const void* logits, Dtype, std::int64_t first, std::int64_t columns, float logit);
    // For tests and benches.
    void (*elementary)(int which, const float* x, float* y, std::int64_t n);
    std::uint64_t (*probe_read)(const char* a, const char* b, std::int64_t bytes);
    void (*probe_write)(const char* a, const char* b, char* to, std::int64_t bytes);
    const ComplementKernels* complement;
};

}  // namespace kl
