// The columns of one row as the sweeps read them: in tiles that fit L1, in steps of two vectors of each side.
#pragma once

#include "pair/row.h"
#include "simd/formats-inl.h"
#include "simd/pipeline-inl.h"

namespace kl::KL_ISA {

// 64 additions to each fp32 accumulator, so that rounding stays well under the promise even where
// every column adds the same number; with AVX-512 2048 columns, 16 KiB of fp32 from both sides.
constexpr std::int64_t kTile = 128 * lanes<VF>;
// The first tile of a block is small: it suffices to choose a reference, and is often swept twice.
constexpr std::int64_t kFirstTile = kTile / 8;
constexpr std::int64_t kAhead = 4096;  // bytes to prefetch ahead: the hardware prefetchers stop at page ends

// Consecutive columns of one row. Those that do not fill a step are copied into one, padded as the sweep
// asks.
template <class T>
struct ColumnSpan {
    const T *a, *b;
    std::int64_t columns;  // a multiple of kStep<T>
    std::int64_t rest;     // columns in the copy
    T last_a[kStep<T>], last_b[kStep<T>];

    ColumnSpan(const T* a_, const T* b_, std::int64_t n)
        : a(a_), b(b_), columns(n / kStep<T> * kStep<T>), rest(n - columns) {
        if (rest == 0) return;
        std::memcpy(last_a, a + columns, static_cast<std::size_t>(rest) * sizeof(T));
        std::memcpy(last_b, b + columns, static_cast<std::size_t>(rest) * sizeof(T));
        fill(minus_infinity<T>(), minus_infinity<T>());
    }

    std::int64_t padding() const { return rest == 0 ? 0 : kStep<T> - rest; }
    void fill(T with_a, T with_b) {
        for (std::int64_t i = rest; i < kStep<T>; ++i) {
            last_a[i] = with_a;
            last_b[i] = with_b;
        }
    }

    // Calls f(a, b) for every step, the copy last.
    template <class F>
    KL_INLINE void for_each_step(F f) const {
        for (std::int64_t i = 0; i < columns; i += kStep<T>) f(a + i, b + i);
        if (rest > 0) f(last_a, last_b);
    }

    // The same, with end_run() outside the inner loop: after every `run` steps, and at the end.
    template <class F, class EndRun>
    KL_INLINE void for_each_step(F f, std::int64_t run, EndRun end_run) const {
        for (std::int64_t i = 0; i < columns;) {
            const std::int64_t stop = smaller(columns, i + run * kStep<T>);
            for (; i < stop; i += kStep<T>) f(a + i, b + i);
            end_run();
        }
        if (rest == 0) return;
        f(last_a, last_b);
        end_run();
    }
};

// Prefetches the cache lines of a later step.
template <class T>
KL_INLINE void prefetch_step(const T* at) {
    for (std::int64_t line = 0; line < static_cast<std::int64_t>(kStep<T> * sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead + line);
}

// Calls take(span) for `n` columns, tile by tile. Short rows too begin with a small one: three in ten are
// swept twice.
template <class T, class Take>
inline void for_each_tile(const T* a, const T* b, std::int64_t n, Take take) {
    std::int64_t length = n > 4 * kFirstTile ? kFirstTile : n;
    for (std::int64_t i = 0; i < n; i += length, length = n - i < kTile ? n - i : kTile)
        take(ColumnSpan<T>(a + i, b + i, length));
}

// The same for columns [first, last) of a row, as take(span, first column): in the format of both sides or,
// where they have two, in fp32 copies in L1.
template <class Take>
inline void for_each_tile(const Row& row, std::int64_t first, std::int64_t last, Take take) {
    if (row.dtype_a == row.dtype_b)
        return in_fp32_format(row.dtype_a, [&]<class T>() {
            const T *a = static_cast<const T*>(row.a), *b = static_cast<const T*>(row.b);
            for_each_tile(a + first, b + first, last - first,
                          [&](const ColumnSpan<T>& tile) { take(tile, tile.a - a); });
        });
    float a[kTile], b[kTile];
    for (std::int64_t i = first; i < last; i += kTile) {
        const std::int64_t n = smaller(last - i, kTile);
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        for_each_tile(a, b, n, [&](const ColumnSpan<float>& tile) { take(tile, i + (tile.a - a)); });
    }
}

}  // namespace kl::KL_ISA
