// Compiled once per instruction set: sums and gradients over the columns of a row that are not given.
#include <cmath>
#include <vector>

#include "elementary.h"
#include "formats.h"
#include "gradient.h"
#include "remainder.h"
#include "stages.h"
#include "sweep.h"

namespace kl::KL_ISA {
namespace {

constexpr std::int64_t kTiles = kBlock / kTile;  // of a block

// A tile as a list of steps: each lies in the row's own memory, but for those that hold a given column or
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

// 2^(k x - m) of columns that are -inf or far below: their product with k would leave the exponents that
// the range reduction can take.
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
    const auto see = [&](V x) KL_INLINE_LAMBDA {
        const V y = max(fma(x, k, -m), deepest);
        return Column{y, reduce(clamp_exponent(y))};
    };
    in_two_stages(
        tile.steps, 1,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(tile.at[i]);
            const auto x = load_pair(tile.at[i]);
            top = max(x.x, max(x.y, top));
            // A NaN that max or exp2 lost on the way.
            bad |= (x.x != x.x) | (x.y != x.y);
            return Pair<Column>{see(x.x), see(x.y)};
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

    RemainderSums total;

private:
    bool refer_to(double top) {
        const S m = static_cast<S>(top) * k_;
        if (!(std::fabs(m) < static_cast<S>(__builtin_inf()))) {
            total.bad = total.bad || top > -__builtin_inf();  // a product past the format's range, or +inf
            return false;
        }
        RemainderSums moved;
        moved.m = static_cast<double>(m);
        moved += total;
        moved.bad = total.bad;
        total = moved;
        return true;
    }

    S k_;
};

// The given columns of a block, tile by tile.
class Given {
public:
    Given(const RemainderRow& row, std::int64_t first, std::int64_t last) : ids_(row.ids), first_(first) {
        for (std::int64_t& head : heads_) head = -1;
        next().resize(static_cast<std::size_t>(row.n_ids));
        for (std::int64_t i = 0; i < row.n_ids; ++i) {
            if (ids_[i] < first || ids_[i] >= last) continue;
            std::int64_t& head = heads_[(ids_[i] - first) / kTile];
            next()[static_cast<std::size_t>(i)] = head;
            head = i;
        }
    }

    template <class F>
    void for_each_of(std::int64_t tile, F f) const {
        for (std::int64_t i = heads_[tile]; i >= 0; i = next()[static_cast<std::size_t>(i)])
            f(ids_[i] - first_ - tile * kTile);
    }

private:
    // Kept by the thread: an allocation a row would cost as much as a small row.
    static std::vector<std::int64_t>& next() {
        static thread_local std::vector<std::int64_t> links;
        return links;
    }

    const std::int64_t* ids_;
    std::int64_t first_;
    std::int64_t heads_[kTiles];
};

template <class T, bool WithEntropy>
RemainderSums sum_as(const RemainderRow& row, std::int64_t first, std::int64_t last) {
    const T* x = static_cast<const T*>(row.x) + first;
    const Given given(row, first, last);
    Summation<T, VF, WithEntropy> sums(static_cast<float>(row.exact_scale()));
    Tile<T> tile;
    for (std::int64_t i = 0, n = 0; i < last - first; i += n, n = 0) {
        n = last - first - i < kTile ? last - first - i : kTile;
        tile.start(x + i, n);
        given.for_each_of(i / kTile, [&](std::int64_t column) { tile.leave_out(column); });
        sums.take(tile);
    }
    return sums.total;
}

RemainderSums sum(const RemainderRow& row, std::int64_t first, std::int64_t last, bool entropy) {
    return in_fp32_format(row.dtype, [&]<class T>() {
        return entropy ? sum_as<T, true>(row, first, last) : sum_as<T, false>(row, first, last);
    });
}

// Calls take(x, first, n) with copies in fp64 of scaled columns, -inf at the given ones.
template <class Take>
void for_each_wide_copy(const RemainderRow& row, std::int64_t first, std::int64_t last, Take take) {
    double x[kScratchColumns];
    for (std::int64_t i = first; i < last; i += kScratchColumns) {
        const std::int64_t n = last - i < kScratchColumns ? last - i : kScratchColumns;
        widen_run(row.x, row.dtype, i, n, x);
        for (std::int64_t j = 0; j < n; ++j) x[j] *= row.exact_scale();
        for (std::int64_t j = 0; j < row.n_ids; ++j)
            if (row.ids[j] >= i && row.ids[j] < i + n) x[row.ids[j] - i] = minus_infinity<double>();
        take(x, i, n);
    }
}

RemainderSums sum_in_fp64(const RemainderRow& row) {
    Summation<double, VD, true> sums(1);
    Tile<double> tile;
    for_each_wide_copy(row, 0, row.columns, [&](const double* x, std::int64_t, std::int64_t n) {
        tile.start(x, n);
        sums.take(tile);
    });
    return sums.total;
}

// pi (to_rest - to_entropy (log pi + entropy)), pi = 2^(k x - lse).
template <bool WithEntropy, class V>
struct RestGradient {
    using S = typename Traits<V>::Scalar;

    RowConstants<V> row;
    V flow, turn;              // of log2 pi
    V begun_flow, begun_turn;  // of log2 pi + lse.lo, times 2^-lse.lo

    static RowScalars as_row(const RemainderScalars& s) {
        RowScalars row{};
        row.lse_a = row.lse_b = s.lse;
        row.coefficient_a = row.coefficient_b = 1;
        return row;
    }

    RestGradient(double scale, const RemainderScalars& s) : row(scale, as_row(s)) {
        const double to_pi = s.to_rest - s.to_entropy * s.entropy, to_log = -s.to_entropy * kLn2;
        const auto lo = static_cast<double>(row.lse_a.lo[0]), rest = std::exp2(-lo);
        flow = splat<V>(static_cast<S>(to_pi));
        turn = splat<V>(static_cast<S>(to_log));
        begun_flow = splat<V>(static_cast<S>((to_pi - lo * to_log) * rest));
        begun_turn = splat<V>(static_cast<S>(to_log * rest));
    }

    // Whether it may be had in two stages: what lse.hi leaves must be a factor near 1.
    bool in_stages() const { return std::fabs(row.lse_a.lo[0]) < 1; }

    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> at(V, V x) const {
        V factor = flow;
        if constexpr (WithEntropy) {
            // -inf times a pi of 0 must not be NaN.
            const V log_pi = product_less(x, row, row.lse_a, V{});
            factor = mad(max(log_pi, splat<V>(-static_cast<S>(0x1p60))), turn, flow);
        }
        return {V{}, power(x, row, row.lse_a, factor)};
    }
};

// The same in two stages, in fp32.
template <bool WithEntropy>
struct StagedRestGradient {
    RestGradient<WithEntropy, VF> of;

    template <bool ToA, bool ToB>
    KL_INLINE Begun<VF> begin(VF, VF x) const {
        Begun<VF> out;
        x = max(x, of.row.lowest_a);
        begin_power(x, of.row, out);
        if constexpr (WithEntropy) out.r = fma(x, of.row.k_lo, out.r);
        return out;
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> end(const Begun<VF>& x) const {
        const VF factor = WithEntropy ? mad(x.r, of.begun_turn, of.begun_flow) : of.begun_flow;
        return {VF{}, scale_product(exp2_fraction(x.log_p.r), factor, x.log_p)};
    }
};

template <bool WithEntropy, class T>
void gradient_with(const T* x, std::int64_t n, double scale, const RemainderScalars& s, T* to, bool stream) {
    const RestGradient<WithEntropy, Wide<T>> gradient(scale, s);
    T* const nowhere = nullptr;
    if constexpr (!std::is_same_v<T, double>) {
        if (gradient.in_stages()) {
            const StagedRestGradient<WithEntropy> staged{gradient};
            return gradient_stretch<false, true>(x, x, n, staged, nowhere, to, stream);
        }
    }
    gradient_stretch<false, true>(x, x, n, gradient, nowhere, to, stream);
}

template <class T>
void gradient_run(const T* x, std::int64_t n, double scale, const RemainderScalars& s, T* to, bool stream) {
    if (s.to_entropy != 0)
        gradient_with<true>(x, n, scale, s, to, stream);
    else
        gradient_with<false>(x, n, scale, s, to, stream);
}

void gradient_in_fp64(const RemainderRow& row, const RemainderScalars& s, Destination to, std::int64_t first,
                      std::int64_t last) {
    double out[kScratchColumns];
    for_each_wide_copy(row, first, last, [&](const double* x, std::int64_t i, std::int64_t n) {
        gradient_run(x, n, 1.0, s, out, false);
        round_run(out, n, to.data, to.dtype, i);
    });
}

void gradient(const RemainderRow& row, const RemainderScalars& s, Destination to, std::int64_t first,
              std::int64_t last, bool stream) {
    // Flows that fp32 cannot hold, and an lse past what two of them hold for a subtraction.
    const auto odd = [](double flow) {
        return flow != 0 && !(std::fabs(flow) > 0x1p-60 && std::fabs(flow) < 0x1p60);
    };
    if (s.form == RemainderForm::fp64 || odd(s.to_rest) || odd(s.to_entropy) || std::fabs(s.lse) > 0x1p20)
        return gradient_in_fp64(row, s, to, first, last);
    in_fp32_format(row.dtype, [&]<class T>() {
        gradient_run(static_cast<const T*>(row.x) + first, last - first, row.exact_scale(), s,
                     static_cast<T*>(to.data) + first, stream);
    });
    if (stream) stream_fence();
}

void place(Destination to, const std::int64_t* ids, const double* values, std::int64_t n, double factor,
           std::int64_t first, std::int64_t last) {
    in_format(to.dtype, [&]<class T>() {
        for (std::int64_t i = 0; i < n; ++i)
            if (ids[i] >= first && ids[i] < last)
                round_one(values[i] * factor, static_cast<T*>(to.data)[ids[i]]);
    });
}

}  // namespace

extern const RemainderKernels remainder_kernels;
const RemainderKernels remainder_kernels{sum, sum_in_fp64, gradient, fill, place};

}  // namespace kl::KL_ISA
