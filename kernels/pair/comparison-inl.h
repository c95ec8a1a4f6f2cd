// Js at 1/2, tv and alpha = sum min(p, q) in one loop, for rows in fp32 whose finite columns are all there
// is.
//
// Of a column's larger and smaller probability, x = smaller/larger = 2^-|r| and u = 1 - x, these are
//     js: larger J(x)/2,  J(x) = (1 + x) log(2/(1 + x)) + x log x;   tv: larger u/2;   alpha: larger x,
// so a column costs two exponentials and no logarithm of its own: with H = 1 - x + x log x, of second order
// in r, which both_ways() has, J = H + K(u), where
//     K(u) = (2 - u) log(2/(2 - u)) - u = -2 sum (u/2)^n / (n (n - 1)),   n = 2, 3, ...,
// is smooth on all of [0, 1]. H is at most twice J: little cancels.
#pragma once

#include "pair/column_span-inl.h"
#include "pair/row.h"
#include "pair/row_constants-inl.h"
#include "simd/elementary-inl.h"
#include "simd/pipeline-inl.h"

namespace kl::KL_ISA {

// The largest log2 q - log2 p that may be added to log2 p in fp32, and where x is nothing.
constexpr double kComparedR = 64;

// Probabilities come times 2^31, so that fp32 holds the smallest that count in an alpha of 1e-12.
constexpr int kComparedGain = 31;

template <bool Exact>
struct Comparison {
    VF k, shift, shift_lo, lse;

    struct Begun {
        VF log_larger, below;
        Reduced<VF> larger, smaller;
    };
    struct SumsOfRun {
        VF js{}, tv{}, alpha{};
    };

    KL_INLINE Begun begin(VF a, VF b) const {
        const VF zero{}, d = b - a;
        VF r = fma(d, k, -shift);
        if constexpr (Exact) r = fma(difference_error(b, a, d), k, r) - shift_lo;
        // Where both sides are -inf r is NaN, of which max and min make a number, and p is 0.
        const VF log_larger = max(fma(a, k, -lse) + max(r, zero), splat<VF>(-1000)),
                 below = -min(abs(r), splat<VF>(120));
        return {log_larger, below, reduce(clamp_exponent(log_larger)), reduce(below)};
    }
    KL_INLINE void end(const Begun& c, SumsOfRun& to) const {
        const VF log2e = splat<VF>(static_cast<float>(kLog2e)), ln2 = splat<VF>(static_cast<float>(kLn2)),
                 one = splat<VF>(1);
        const VF larger = exp2_from(c.log_larger, c.larger);
        const VF n = integer(c.smaller), two_n = scale(one, c.smaller), e = c.smaller.r;
        // As in both_ways(): where n is 0 what stands beside terms of second order vanishes exactly.
        const VF rp = e * horner(Poly<VF>::g, e), r2p = e * rp, f = mad(e, rp, e), scaled_f = two_n * ln2 * f;
        const VF x = scaled_f + two_n, minus_u = scaled_f + (two_n - one);
        const VF h = mad(two_n, mad(f, c.below * ln2, -r2p), mad(two_n, n - log2e, log2e));
        to.js = mad(larger, mad(h, ln2, minus_u * minus_u * horner(kK, minus_u)), to.js);
        to.tv = mad(larger, minus_u, to.tv);
        to.alpha = mad(larger, x, to.alpha);
    }

private:
    // K(u)/u^2 in -u, to 1e-6 of J/u^2 on [0, 1].
    static constexpr double kK[] = {-0.24999975932, 0.04168448469,  -0.01020879986,
                                    0.00398156384,  0.000465849052, 0.00144339347};
};

inline bool may_compare_fast(const RowScalars& s) { return s.top_r < kComparedR; }

// Whether the shift, and b - a that it is taken off, must be right to more than one fp32 holds.
template <class T>
inline bool must_be_exact(const RowScalars& s) {
    const double shift = std::fabs(s.shift) * kLn2;
    // A token that holds nearly all the mass has an r of next to nothing, to whose square a rounded shift
    // adds its own. Of 16-bit logits few differences are rounded, and those by less than 2^-24 of the larger.
    const double enough = sizeof(T) == 4 ? 64 : 0x1p30;
    return shift > 4 || !(enough * s.divergence > shift * shift);
}

template <bool Exact, class T>
KL_NOINLINE FormulaSums compare_steps(const ColumnSpan<T>& in, double scale, const RowScalars& s) {
    const Offset<VF> lse(s.lse_a - kComparedGain, 0);
    const Offset<VF> shift(s.shift, 0);
    const Comparison<Exact> of{splat<VF>(static_cast<float>(scale)),
                               Exact ? shift.hi : splat<VF>(static_cast<float>(s.shift)), shift.lo, lse.hi};
    typename Comparison<Exact>::SumsOfRun run;
    FormulaSums total;
    const auto end_run = [&]() KL_INLINE_LAMBDA {
        total += {sum(run.js), sum(run.tv), sum(run.alpha)};
        run = {};
    };
    using Begun = typename Comparison<Exact>::Begun;
    const auto begin = [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        return Pair<Begun>{of.begin(a.x, b.x), of.begin(a.y, b.y)};
    };
    const auto end = [&](const Pair<Begun>& step) KL_INLINE_LAMBDA {
        of.end(step.x, run);
        of.end(step.y, run);
    };
    pipelined(
        in.columns, kStep<T>, [&](std::int64_t i) KL_INLINE_LAMBDA { return begin(in.a + i, in.b + i); },
        [&](std::int64_t, const Pair<Begun>& step) KL_INLINE_LAMBDA { end(step); }, 32, end_run);
    if (in.rest > 0) end(begin(in.last_a, in.last_b));
    end_run();
    const double unit = std::exp2(-static_cast<double>(lse.lo[0]) - kComparedGain);
    return {total.value * unit / 2, -total.mean_a * unit / 2, total.mean_b * unit};
}

template <class T>
inline FormulaSums compare(const ColumnSpan<T>& in, double scale, const RowScalars& s) {
    return must_be_exact<T>(s) ? compare_steps<true>(in, scale, s) : compare_steps<false>(in, scale, s);
}

}  // namespace kl::KL_ISA
