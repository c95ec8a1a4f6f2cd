// The value sweep of KL(a||b), and its fallback in fp64.
#include "isa/entries-inl.h"
#include "pair/copies-inl.h"
#include "pair/fallback-inl.h"
#include "pair/value_sweep-inl.h"

namespace kl::KL_ISA {
namespace {

template <class T>
State sweep_block_as(const Row& row, std::int64_t first, std::int64_t last) {
    Accumulator accumulator(row.scale());
    for_each_tile(at<T>(row.a, first), at<T>(row.b, first), last - first,
                  [&](const ColumnSpan<T>& tile) { accumulator.take(tile); });
    return accumulator.total();
}

// Two formats: widened to fp32 in L1 first.
State sweep_block_mixed(const Row& row, std::int64_t first, std::int64_t last) {
    Accumulator accumulator(row.scale());
    float a[kTile], b[kTile];
    for (std::int64_t i = first; i < last; i += kTile) {
        const std::int64_t n = last - i < kTile ? last - i : kTile;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        for_each_tile(a, b, n, [&](const ColumnSpan<float>& tile) { accumulator.take(tile); });
    }
    return accumulator.total();
}

}  // namespace

State sweep_block(const Row& row, std::int64_t first, std::int64_t last) {
    if (row.dtype_a != row.dtype_b) return sweep_block_mixed(row, first, last);
    return in_fp32_format(row.dtype_a, [&]<class T>() { return sweep_block_as<T>(row, first, last); });
}

}  // namespace kl::KL_ISA
