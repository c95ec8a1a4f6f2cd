// The sweep of token statistics, each side by itself, and single logits.
#include "isa/entries-inl.h"
#include "pair/copies-inl.h"
#include "token_stats/side-inl.h"
#include "token_stats/sweep-inl.h"

namespace kl::KL_ISA {
namespace {

template <class T>
PairState sweep_pair_block_as(const Row& row, std::int64_t first, std::int64_t last) {
    PairAccumulator accumulator(row.scale());
    const T* a = at<T>(row.a, first);
    for_each_tile(a, at<T>(row.b, first), last - first,
                  [&](const ColumnSpan<T>& tile) { accumulator.take(tile, first + (tile.a - a)); });
    return accumulator.total();
}

PairState sweep_pair_block_mixed(const Row& row, std::int64_t first, std::int64_t last) {
    PairAccumulator accumulator(row.scale());
    float a[kTile], b[kTile];
    for (std::int64_t i = first; i < last; i += kTile) {
        const std::int64_t n = last - i < kTile ? last - i : kTile;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        for_each_tile(a, b, n,
                      [&](const ColumnSpan<float>& tile) { accumulator.take(tile, i + (tile.a - a)); });
    }
    return accumulator.total();
}

}  // namespace

PairState sweep_pair_block(const Row& row, std::int64_t first, std::int64_t last) {
    if (row.dtype_a != row.dtype_b) return sweep_pair_block_mixed(row, first, last);
    return in_fp32_format(row.dtype_a, [&]<class T>() { return sweep_pair_block_as<T>(row, first, last); });
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
