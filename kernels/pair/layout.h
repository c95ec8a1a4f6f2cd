// A pair of logits tensors row by row, and each row block by block.
#pragma once

#include "runtime/blocks.h"
#include "runtime/dispatch.h"

namespace kl {

struct Layout : RowBlocks<RowPair> {
    Row row(std::int64_t r) const {
        return {row_of(p.a, r), row_of(p.b, r), p.a.dtype, p.b.dtype, p.a_scale(r), p.b_scale(r), p.columns};
    }
    State block(const Row& row, std::int64_t n) const { return k.sweep_block(row, first(n), last(n)); }
    FormulaSums formula_block(const Row& row, const RowScalars& scalars, std::int64_t n) const {
        return k.formula_sums(row, scalars, first(n), last(n));
    }
};

// A row's KL(a||b) and what else `value` needs, by whichever path its logits take.
RowResult evaluate(const Layout&, const Row&);

}  // namespace kl
