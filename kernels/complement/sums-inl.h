// Sums over the columns of a row that are not picked.
#pragma once

#include <cmath>

#include "complement/complement.h"
#include "isa/entries-inl.h"
#include "pair/column_span-inl.h"
#include "simd/elementary-inl.h"

namespace kl::KL_ISA {

constexpr std::int64_t kTiles = kBlock / kTile;  // of a block

// A tile as a list of steps: each lies in the row's own memory, but for those that hold a picked column or
// the row's end. These are copies with -inf in what does not count, so the sweep needs no mask.
template <class T>
class Tile {
public:
    std::int64_t steps = 0;
    const T* at[kTile / kStep<T>];

    void start(const T* x, std::int64_t n) {
        steps = n / kStep<T>;
        for (std::int64_t i = 0; i < steps; ++i) at[i] = x + i * kStep<T>;
        const std::int64_t rest = n - steps * kStep<T>;
        if (rest == 0) return;
        T* last = copy_[steps];
        std::memcpy(last, x + steps * kStep<T>, static_cast<std::size_t>(rest) * sizeof(T));
        for (std::int64_t i = rest; i < kStep<T>; ++i) last[i] = minus_infinity<T>();
        at[steps++] = last;
    }

    void leave_out(std::int64_t column) {
        const std::int64_t step = column / kStep<T>;
        if (at[step] != copy_[step]) {
            std::memcpy(copy_[step], at[step], sizeof copy_[step]);
            at[step] = copy_[step];
        }
        copy_[step][column % kStep<T>] = minus_infinity<T>();
    }

private:
    alignas(64) T copy_[kTile / kStep<T>][kStep<T>];
};

// 2^(k x - m) of columns that are -inf or far below: k times them is past what the range reduction takes.
constexpr double kDeepest = -4000;

template <class V>
struct TileSums {
    double z, t;
    double top;
    bool bad;
};

template <bool WithEntropy, class T, class V>
inline TileSums<V> sweep_tile(const Tile<T>& tile, V k, V m) {
    using S = typename Traits<V>::Scalar;
    const V deepest = splat<V>(static_cast<S>(kDeepest)), inf = splat<V>(static_cast<S>(__builtin_inf()));
    V z{}, t{}, run_z{}, run_t{}, top = -inf;
    Mask<V> bad{};
    struct Column {
        V y;
        Reduced<V> e;
    };
    const auto prepare = [&](V x) KL_INLINE_LAMBDA {
        const V y = max(fma(x, k, -m), deepest);
        return Column{y, reduce(clamp_exponent(y))};
    };
    pipelined(
        tile.steps, 1,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(tile.at[i]);
            const auto x = load_pair(tile.at[i]);
            top = max(x.x, max(x.y, top));
            // max and exp2 lose a NaN on the way.
            bad |= (x.x != x.x) | (x.y != x.y);
            return Pair<Column>{prepare(x.x), prepare(x.y)};
        },
        [&](std::int64_t i, const Pair<Column>& c) KL_INLINE_LAMBDA {
            const V w0 = exp2_from(c.x.y, c.x.e), w1 = exp2_from(c.y.y, c.y.e);
            run_z += w0 + w1;
            if constexpr (WithEntropy) run_t += mad(w0, c.x.y, w1 * c.y.y);
            if (i % kRun == 0) [[unlikely]] {
                z += run_z;
                t += run_t;
                run_z = run_t = V{};
            }
        });
    z += run_z;
    t += run_t;
    const double highest = static_cast<double>(largest(top));
    return {sum(z), sum(t), highest, any<V>(bad) || highest == __builtin_inf()};
}

template <class T, class V>
inline double top_of(const Tile<T>& tile) {
    using S = typename Traits<V>::Scalar;
    V top = splat<V>(-static_cast<S>(__builtin_inf()));
    for (std::int64_t i = 0; i < tile.steps; ++i) {
        const auto x = load_pair(tile.at[i]);
        top = max(x.x, max(x.y, top));
    }
    return static_cast<double>(largest(top));
}

// Sums tile by tile. The reference m follows the largest column: a weight past 2 would have an exponent whose
// rounding begins to show, so a tile that rises above m is swept once more, about ln(tiles) times a row.
template <class T, class V, bool WithEntropy>
class Summation {
    using S = typename Traits<V>::Scalar;

public:
    explicit Summation(S k) : k_(k) {}

    void take(const Tile<T>& tile) {
        if (!(total.m > -__builtin_inf()) && !refer_to(top_of<T, V>(tile))) {
            // No mass here, unless a NaN hid from the maximum.
            total.bad = total.bad || sweep_tile<false>(tile, splat<V>(k_), V{}).bad;
            return;
        }
        TileSums<V> s = sweep_tile<WithEntropy>(tile, splat<V>(k_), splat<V>(static_cast<S>(total.m)));
        if (s.top * static_cast<double>(k_) > total.m + 1 && refer_to(s.top))
            s = sweep_tile<WithEntropy>(tile, splat<V>(k_), splat<V>(static_cast<S>(total.m)));
        total.z += s.z;
        total.t += s.t;
        total.bad = total.bad || s.bad;
    }

    ComplementSums total;

private:
    bool refer_to(double top) {
        const S m = static_cast<S>(top) * k_;
        if (!(std::fabs(m) < static_cast<S>(__builtin_inf()))) {
            total.bad = total.bad || top > -__builtin_inf();  // a product past the format's range, or +inf
            return false;
        }
        ComplementSums rebased;
        rebased.m = static_cast<double>(m);
        rebased += total;
        rebased.bad = total.bad;
        total = rebased;
        return true;
    }

    S k_;
};

// All of n columns from a reference that none lies far above, where nothing is a NaN or +inf.
template <class T>
inline ComplementSums sum_known_run(const T* x, std::int64_t n, float scale, float reference) {
    const VF k = splat<VF>(scale), m = splat<VF>(reference),
             deepest = splat<VF>(static_cast<float>(kDeepest));
    struct Column {
        VF y;
        Reduced<VF> e;
    };
    ComplementSums out;
    out.m = static_cast<double>(reference);
    VF z{}, t{}, run_z{}, run_t{};
    const auto begin = [&](VF logit) KL_INLINE_LAMBDA {
        const VF y = max(fma(logit, k, -m), deepest);
        return Column{y, reduce(clamp_exponent(y))};
    };
    const auto begin_step = [&](const T* at) KL_INLINE_LAMBDA {
        const auto both = load_pair(at);
        return Pair<Column>{begin(both.x), begin(both.y)};
    };
    const auto end = [&](std::int64_t, const Pair<Column>& c) KL_INLINE_LAMBDA {
        const VF w0 = exp2_from(c.x.y, c.x.e), w1 = exp2_from(c.y.y, c.y.e);
        run_z += w0 + w1;
        run_t += mad(w0, c.x.y, w1 * c.y.y);
    };
    const auto end_run = [&]() KL_INLINE_LAMBDA {
        z += run_z;
        t += run_t;
        run_z = run_t = VF{};
    };
    const auto end_tile = [&]() {
        end_run();
        out.z += sum(z);
        out.t += sum(t);
        z = t = VF{};
    };
    const std::int64_t whole = n / kStep<T> * kStep<T>;
    for (std::int64_t i = 0; i < whole; i += kTile) {
        pipelined(
            smaller(kTile, whole - i), kStep<T>,
            [&](std::int64_t j) KL_INLINE_LAMBDA { return begin_step(x + i + j); }, end, kRun, end_run);
        end_tile();
    }
    if (whole == n) return out;
    T last[kStep<T>];
    std::memcpy(last, x + whole, static_cast<std::size_t>(n - whole) * sizeof(T));
    for (std::int64_t i = n - whole; i < kStep<T>; ++i) last[i] = minus_infinity<T>();
    end(0, begin_step(last));
    end_tile();
    return out;
}

// The picked columns of a block, tile by tile.
class PickedColumns {
public:
    PickedColumns(const ComplementRow& row, std::int64_t first, std::int64_t last)
        : ids_(row.ids), next_(row.scratch), first_(first) {
        for (std::int64_t& head : heads_) head = -1;
        for (std::int64_t i = 0; i < row.n_ids; ++i) {
            if (ids_[i] < first || ids_[i] >= last) continue;
            std::int64_t& head = heads_[(ids_[i] - first) / kTile];
            next_[i] = head;
            head = i;
        }
    }

    template <class F>
    void for_each_of(std::int64_t tile, F f) const {
        for (std::int64_t i = heads_[tile]; i >= 0; i = next_[i]) f(ids_[i] - first_ - tile * kTile);
    }

private:
    const std::int64_t* ids_;
    std::int64_t* next_;
    std::int64_t first_;
    std::int64_t heads_[kTiles];
};

template <class T, bool WithEntropy>
ComplementSums sum_as(const ComplementRow& row, std::int64_t first, std::int64_t last) {
    const T* x = static_cast<const T*>(row.x) + first;
    const PickedColumns picked(row, first, last);
    Summation<T, VF, WithEntropy> sums(static_cast<float>(row.exact_scale()));
    Tile<T> tile;
    for (std::int64_t i = 0, n = 0; i < last - first; i += n, n = 0) {
        n = last - first - i < kTile ? last - first - i : kTile;
        tile.start(x + i, n);
        picked.for_each_of(i / kTile, [&](std::int64_t column) { tile.leave_out(column); });
        sums.take(tile);
    }
    return sums.total;
}

}  // namespace kl::KL_ISA
