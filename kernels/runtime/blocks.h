// The rows of a call and their blocks, and how threads share them: whole rows, or blocks of a row where there
// are fewer rows than threads. Callers fold a row's blocks from the first to the last either way, so its bits
// depend on nothing but the row.
#pragma once

#include <algorithm>
#include <vector>

#include "api.h"
#include "isa/kernels.h"
#include "runtime/parallel_for.h"

namespace kl {

// Args is what a caller handed over: RowPair or ComplementArgs.
template <class Args>
struct RowBlocks {
    const Args& p;
    const Kernels& k;

    std::int64_t rows() const { return p.size_a * p.size_b; }
    std::int64_t blocks() const { return (p.columns + k.block - 1) / k.block; }
    std::int64_t first(std::int64_t block) const { return block * k.block; }
    std::int64_t last(std::int64_t block) const { return std::min(p.columns, (block + 1) * k.block); }
    std::int64_t index(std::int64_t r, std::int64_t stride_a, std::int64_t stride_b) const {
        return r / p.size_b * stride_a + r % p.size_b * stride_b;
    }
    // Where row r of a tensor begins, in bytes; Tensor is Logits or Gradient.
    template <class Tensor>
    std::int64_t offset(const Tensor& t, std::int64_t r) const {
        return index(r, t.stride_a, t.stride_b) * size_of(t.dtype);
    }
    const void* row_of(const Logits& t, std::int64_t r) const {
        return static_cast<const char*>(t.data) + offset(t, r);
    }
    Destination row_of(const Gradient& t, std::int64_t r) const {
        return {t.data == nullptr ? nullptr : static_cast<char*>(t.data) + offset(t, r), t.dtype};
    }
    bool is_valid(std::int64_t r) const {
        return p.valid.data == nullptr || p.valid.data[index(r, p.valid.stride_a, p.valid.stride_b)] != 0;
    }
    // Rows per item of work: fewer than kGrain columns are not worth handing to another thread.
    std::int64_t rows_per_item() const {
        constexpr std::int64_t kGrain = 32768;
        return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(p.columns, 1));
    }
    bool splits_rows() const {
        return p.threads > 1 && blocks() > 1 && rows() < 2 * static_cast<std::int64_t>(p.threads);
    }
};

// Calls f(row) for every row, over threads.
template <class Args, class F>
void for_each_row(const RowBlocks<Args>& in, F f) {
    const std::int64_t step = in.rows_per_item(), rows = in.rows();
    parallel_for((rows + step - 1) / step, in.p.threads, [&](std::int64_t i) {
        for (std::int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) f(r);
    });
}

// Calls f(row, block) for every block of every row, over threads.
template <class Args, class F>
void for_each_block(const RowBlocks<Args>& in, F f) {
    const std::int64_t blocks = in.blocks();
    parallel_for(in.rows() * blocks, in.p.threads, [&](std::int64_t i) { f(i / blocks, i % blocks); });
}

// Calls finish(row, part) once for every row, where part(n) is what block(row, n) gives. Where rows are to be
// split, blocks are evaluated over threads beforehand, and those of rows that are not valid stay empty.
template <class Args, class Block, class Finish>
void fold_blocks(const RowBlocks<Args>& in, bool split, Block block, Finish finish) {
    if (!split)
        return for_each_row(in,
                            [&](std::int64_t r) { finish(r, [&](std::int64_t n) { return block(r, n); }); });
    const std::int64_t blocks = in.blocks();
    std::vector<decltype(block(0, 0))> parts(static_cast<std::size_t>(in.rows() * blocks));
    const auto at = [&](std::int64_t r, std::int64_t n) { return static_cast<std::size_t>(r * blocks + n); };
    for_each_block(in, [&](std::int64_t r, std::int64_t n) {
        if (in.is_valid(r)) parts[at(r, n)] = block(r, n);
    });
    for_each_row(in, [&](std::int64_t r) { finish(r, [&](std::int64_t n) { return parts[at(r, n)]; }); });
}

// Calls f<R>() with the type that rows are computed in.
template <class F>
void in_compute_type(bool wide, F f) {
    if (wide)
        f.template operator()<double>();
    else
        f.template operator()<float>();
}

}  // namespace kl
