// The rows of a problem and their blocks: where they lie, and how threads share them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "contract.h"
#include "dispatch.h"
#include "pool.h"
#include "row.h"

namespace kl {

constexpr std::int64_t kGrain = 32768;  // columns worth handing to another thread

template <class T, class Side>
T* row_of(T* data, const Side& side, std::int64_t i, std::int64_t j) {
    const std::int64_t offset = (i * side.stride_a + j * side.stride_b) * size_of(side.dtype);
    return static_cast<T*>(static_cast<std::conditional_t<std::is_const_v<T>, const char*, char*>>(data) +
                           offset);
}

struct Layout {
    const Problem& p;
    const Kernels& k;

    std::int64_t rows() const { return p.size_a * p.size_b; }
    std::int64_t blocks() const { return (p.columns + k.block - 1) / k.block; }
    bool counts(std::int64_t r) const {
        return p.rows.data == nullptr ||
               p.rows.data[r / p.size_b * p.rows.stride_a + r % p.size_b * p.rows.stride_b] != 0;
    }
    Row row(std::int64_t r) const {
        const std::int64_t i = r / p.size_b, j = r % p.size_b;
        return {row_of(p.a.data, p.a, i, j),
                row_of(p.b.data, p.b, i, j),
                p.a.dtype,
                p.b.dtype,
                p.a.scale,
                p.b.scale,
                p.columns};
    }
    Destination to(const Gradient& g, std::int64_t r) const {
        if (g.data == nullptr) return {nullptr, g.dtype};
        return {row_of(g.data, g, r / p.size_b, r % p.size_b), g.dtype};
    }
    State block(const Row& row, std::int64_t n) const {
        return k.collect(row, n * k.block, std::min(p.columns, (n + 1) * k.block));
    }

    FamilySums family_block(const Row& row, const RowScalars& scalars, std::int64_t n) const {
        return k.family_sums(row, scalars, n * k.block, std::min(p.columns, (n + 1) * k.block));
    }

    // Rows per item of work, and whether rows are split at all.
    std::int64_t rows_per_item() const {
        return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(p.columns, 1));
    }
    bool splits_rows() const {
        return p.threads > 1 && blocks() > 1 && rows() < 2 * static_cast<std::int64_t>(p.threads);
    }
};

// Calls f(row) for every row, over threads.
template <class F>
void for_each_row(const Layout& layout, F f) {
    const std::int64_t step = layout.rows_per_item(), rows = layout.rows();
    auto item = [&](std::int64_t i) {
        for (std::int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) f(r);
    };
    run_items((rows + step - 1) / step, layout.p.threads,
              [](void* c, std::int64_t i) { (*static_cast<decltype(item)*>(c))(i); }, &item);
}

// Calls f(row, block) for every block of every row, over threads.
template <class F>
void for_each_block(const Layout& layout, F f) {
    const std::int64_t blocks = layout.blocks();
    auto item = [&](std::int64_t i) { f(i / blocks, i % blocks); };
    run_items(
        layout.rows() * blocks, layout.p.threads,
        [](void* c, std::int64_t i) { (*static_cast<decltype(item)*>(c))(i); }, &item);
}

// A row's KL(a||b) and what else `value` needs, by whichever path its logits take.
RowResult look_at(const Layout&, const Row&);

}  // namespace kl
