// The sweep of token statistics, each side by itself, and single logits.
#include "isa/entries-inl.h"
#include "token_stats/side-inl.h"
#include "token_stats/sweep-inl.h"

namespace kl::KL_ISA {

PairState sweep_pair_block(const Row& row, std::int64_t first, std::int64_t last) {
    PairAccumulator accumulator(row.scale());
    for_each_tile(row, first, last,
                  [&](const auto& tile, std::int64_t column) { accumulator.take(tile, column); });
    return accumulator.total();
}

double logit(const void* logits, Dtype dtype, std::int64_t column) {
    double x;
    widen_run(logits, dtype, column, 1, &x);
    return x;
}

std::int64_t find(const void* logits, Dtype dtype, std::int64_t first, std::int64_t columns, float logit) {
    float x[kScratchColumns];
    for (std::int64_t i = 0; i < columns; i += kScratchColumns) {
        const std::int64_t n = columns - i < kScratchColumns ? columns - i : kScratchColumns;
        widen_run(logits, dtype, first + i, n, x);
        for (std::int64_t j = 0; j < n; ++j)
            if (x[j] == logit) return first + i + j;
    }
    return -1;
}

}  // namespace kl::KL_ISA
