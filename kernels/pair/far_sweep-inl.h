// The value's sweep where D is large: the three sums of its definition, sum 2^a, sum 2^b and sum 2^a (b - a).
//
// D = lse(b) - lse(a) - E_a[d] cancels nothing there, asks for no series, and takes any logits: whether a
// column is missing on a side, or nearly, only its weights know. What comes of a tile is a State like
// any other.
#pragma once

#include <cmath>

#include "pair/column_span-inl.h"
#include "pair/state.h"
#include "simd/elementary-inl.h"

namespace kl::KL_ISA {

// log2 x or up to kChord more, x normal: between powers of 2 a logarithm lies above its chord.
constexpr double kChord = 0.0861;
inline double log2_above(double x) {
    const auto exponent_and_fraction = static_cast<double>(bits<std::int64_t>(x)) * 0x1p-52;
    return exponent_and_fraction - (1023 - kChord);
}

// Where Lone, a's weights come times 2^kRaised and all x times kSmall, so that fp32 holds both where an x of
// -3e38 counts down to weights of 2^-200.
constexpr float kRaised = 90;
template <bool Lone>
constexpr float kSmall = Lone ? 0x1p-100f : 1;
// More than any finite x of a scale up to kMostScale, in these units. Without, such an x is left to Lone.
template <bool Lone>
constexpr float kMissing = Lone ? 0x1p30f : 0x1p60f;
constexpr float kMostScale = 1.5f, kLeastScale = 0x1p-20f;
// Past this x some product of fp32 overflows; and b is so low that no formula of fp32 may multiply by it.
constexpr double kOddX = 0x1p100, kLowX = -0x1p19;
// Columns of a lower x would hide the others' share of D's sums.
constexpr float kLoneX = -64;

// 2^(x + kRaised), down to an x of -215, and then 0.
KL_INLINE VF raised_exp2(VF x) {
#if KL_WIDTH == 64
    Reduced<VF> e = reduce(x);
    e.n += splat<VF>(kRaised);
    return scale(exp2_fraction(e.r), e);
#else
    const VF lowest = splat<VF>(-215);
    Reduced<VF> e = reduce(min(splat<VF>(36), max(lowest, x)));
    e.n += splat<VF>(kRaised);
    return x > lowest ? scale(exp2_fraction(e.r), e) : VF{};
#endif
}

template <bool Lone>
struct FarSums {
    VF z{}, s{}, u{};
    [[maybe_unused]] VF lone_z{}, lone_s{};

    KL_INLINE void take(FarSums& run) {
        z += run.z;
        s += run.s;
        u += run.u;
        run.z = run.s = run.u = VF{};
        if constexpr (Lone) {
            lone_z += run.lone_z;
            lone_s += run.lone_s;
            run.lone_z = run.lone_s = VF{};
        }
    }
};

// At most the span's D times its mass, in units of ln 2, from sums of any loop.
inline double least_flow(const State& s) {
    const double u = s.z + kLn2 * (s.a1 + s.a2), z = s.z + s.lone_z;
    if (!(u > 0 && z > 0)) return 0;
    return z * (log2_above(u) - log2_above(z) - kChord) - s.a1 + s.lone_x;
}

// Whether D is so large that these sums hold it; `flow` of what has been summed.
inline bool is_far(const State& s, double flow, double margin) {
    return (s.flags & kSawInfinite) || s.z + s.lone_z == 0 ||
           6.5 * flow > margin * (2.1 * (s.z + s.lone_z) + s.far_sum);
}

// False where fp32 does not hold the sums, and where a logit is NaN. Unless Lone, also where it must be.
// b's weights are measured from m_b.
template <bool Exact, bool Lone, class T>
inline bool sweep_far(const ColumnSpan<T>& in, float scale, Reference r, float m_b, State& out) {
    out = {};
    out.reference = r;
    if (!(scale < kMostScale && scale > kLeastScale)) return false;
    constexpr float small = kSmall<Lone>;
    const VF k = splat<VF>(scale), small_k = splat<VF>(scale * small), small_c = splat<VF>(r.c * small);
    const VF m_of_a = splat<VF>(r.m), m_of_b = splat<VF>(m_b), missing = splat<VF>(kMissing<Lone>);
    VF high = -missing, low = missing;
    [[maybe_unused]] VI bad{};
    FarSums<Lone> sums, total;
    struct Begun {
        VF log_w, log_u, x;
    };
    const auto begin = [&](VF a, VF b) KL_INLINE_LAMBDA {
        if constexpr (kWidth < 64) {  // there a clamped exponent is no NaN
            const VF inf = splat<VF>(__builtin_inff());
            bad |= ~((a < inf) & (b < inf));
        }
        const VF d = b - a, log_w = fma(a, k, -m_of_a), log_u = fma(b, k, -m_of_b);
        VF x = fma(d, small_k, -small_c);
        if constexpr (Exact) {
            const VF error = difference_error(b, a, d);
            x = fma(error == error ? error : VF{}, small_k, x);
        }
        return Begun{log_w, log_u, x};
    };
    const auto end = [&](const Begun& column) KL_INLINE_LAMBDA {
        const VF w = Lone ? raised_exp2(column.log_w) : exp2(column.log_w), u = exp2(column.log_u);
        // Where both are -inf it is NaN, which these leave out.
        high = max(column.x, high);
        low = min(column.x, low);
        const VF x = within(column.x, missing);
        sums.u += u;
        if constexpr (Lone) {
            const VI lone = x < splat<VF>(kLoneX * small);
            const VF zero{}, near_w = lone ? zero : w, lone_w = lone ? w : zero;
            sums.z += near_w;
            sums.s = mad(near_w, x, sums.s);
            sums.lone_z += lone_w;
            sums.lone_s = mad(lone_w, x, sums.lone_s);
        } else {
            sums.z += w;
            sums.s = mad(w, x, sums.s);
        }
    };
    const auto begin_step = [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        return Pair<Begun>{begin(a.x, b.x), begin(a.y, b.y)};
    };
    const auto end_step = [&](const Pair<Begun>& step) KL_INLINE_LAMBDA {
        end(step.x);
        end(step.y);
    };
    pipelined(
        in.columns, kStep<T>,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(in.a + i);
            prefetch_step(in.b + i);
            return begin_step(in.a + i, in.b + i);
        },
        [&](std::int64_t, const Pair<Begun>& step) KL_INLINE_LAMBDA { end_step(step); }, kRun,
        [&]() KL_INLINE_LAMBDA { total.take(sums); });
    if (in.rest > 0) end_step(begin_step(in.last_a, in.last_b));
    total.take(sums);

    const double unit = Lone ? std::exp2(-static_cast<double>(kRaised)) : 1;
    const double unit_of_x = 1 / static_cast<double>(small), unit_of_s = unit * unit_of_x;
    const double top = unit_of_x * static_cast<double>(largest(high)),
                 bottom = -unit_of_x * static_cast<double>(largest(-low));
    const double u = sum(total.u) * std::exp2(static_cast<double>(m_b) - static_cast<double>(r.m) -
                                              static_cast<double>(r.c));
    out.z = sum(total.z) * unit;
    out.a1 = sum(total.s) * unit_of_s;
    const bool is_infinite = Lone && bottom <= -unit_of_x * static_cast<double>(kMissing<Lone>);
    double z = out.z, s = out.a1;
    if constexpr (Lone) {
        out.lone_z = sum(total.lone_z) * unit;
        out.lone_x = is_infinite ? 0 : -sum(total.lone_s) * unit_of_s;
        z += out.lone_z;
        s -= out.lone_x;
    }
    out.a2 = (u - out.z) * kLog2e - out.a1;
    out.top_d = static_cast<double>(r.c) + top;
    // A clamped exponent is no infinity either.
    constexpr double most = 0x1p120;
    double weights = sum(total.z);
    if constexpr (Lone) weights += sum(total.lone_z);
    if (!(weights < most && sum(total.u) < most) || any<VF>(bad)) return false;
    if (top > kOddX || bottom < -kOddX) out.flags |= kSawNegInf;
    if (bottom < kLowX && !is_infinite) out.flags |= kSawFarB;
    if (is_infinite) out.flags |= kSawInfinite;
    if (u > 0) out.flags |= kSawB;
    if (!Lone && bottom < kLowX) return false;
    out.fp32_sum_z = out.z;
    out.fp32_sum = length(u, out.z) * kLog2e;
    if (z == 0) return true;
    // sum 2^a |x| is at most 1.07 u - s, because x is less than 0.54 2^x; and that from where sum 2^b is z.
    const double level = log2_above(u) - log2_above(z);
    out.far_sum = smaller(1.07 * u, z * (1.2 + std::fabs(level) + level)) - s;
    return true;
}

}  // namespace kl::KL_ISA
