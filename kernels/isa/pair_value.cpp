// The value sweep of KL(a||b), and its fallback in fp64.
#include "isa/entries-inl.h"
#include "pair/fallback-inl.h"
#include "pair/value_sweep-inl.h"

namespace kl::KL_ISA {

State sweep_block(const Row& row, std::int64_t first, std::int64_t last) {
    Accumulator accumulator(row.scale());
    for_each_tile(row, first, last, [&](const auto& tile, std::int64_t) { accumulator.take(tile); });
    return accumulator.total();
}

}  // namespace kl::KL_ISA
