// The value's sweep: one read of a span of columns in fp32, whatever 16- or 32-bit format holds them.
//
// It goes tile by tile, each small enough to come from L1 when it is read a second time, with the
// reference (m, c) fixed inside a tile. The reference that suits the first tile need not suit the row: real
// teachers put most of their mass on a few tokens in some other tile, and measured from a c that is far
// from E_a[d] almost all of a2 would cancel in the end. So a tile that moves the mean far
// is swept again, from its own mean. That happens about ln(#tiles) times in a row.
//
// A tile takes the first loop that can do it: for finite columns; for columns of which some are -inf on both
// sides or in a; for whatever there is.
#pragma once

#include <cmath>

#include "pair/column_span-inl.h"
#include "pair/state.h"
#include "simd/elementary-inl.h"

namespace kl::KL_ISA {

// The largest g2(x) says how far x went in either direction. Past this one 2^x may outweigh a weight that has
// already underflowed to 0, and so may -x, where b is -1e30.
constexpr double kLargeG = 0x1p48;
// g2(16) and g2(32), where the rounding of 2^x begins to show in lse(b) and in the value.
constexpr double kTailG = 0x1p16 * kLog2e, kFarTailG = 0x1p32 * kLog2e;
// The same for the sweep of spans with -inf, on x itself.
constexpr float kTailX = 16, kLargeX = 48, kFarB = -0x1p32f;
constexpr float kHugeA = 0x1p20f;
constexpr double kLargeSum = 0x1p100;

constexpr float kOutOfRange = 0x1p100f;  // beyond it products with log2(e) / temperature may overflow

struct Sums {
    double z, a1, a2, largest_g;
    bool lone_b;  // b is not -inf in some column where a is
};

struct VectorSums {
    VF z{}, a1{}, a2{}, largest_g{};

    KL_INLINE void take(VectorSums& run) {
        z += run.z;
        a1 += run.a1;
        a2 += run.a2;
        run.z = run.a1 = run.a2 = VF{};
    }
};

// A column before the polynomials: log2 of its weight, its distance x from the reference's c, and both after
// the range reduction. Exact keeps the rounding error of b - a too.
struct PreparedColumn {
    VF log_w, x;
    Reduced<VF> w, two_x;
};

template <bool Exact>
KL_INLINE PreparedColumn prepare(VF a, VF b, VF k, VF m, VF c) {
    const VF d = b - a;
    VF x = fma(d, k, -c);
    if constexpr (Exact) x = fma(difference_error(b, a, d), k, x);
    x = g2_domain(x);
    const VF log_w = fma(a, k, -m);
    return {log_w, x, reduce(clamp_exponent(log_w)), reduce(clamp_exponent(x))};
}

// Both vectors of a step go into one set of sums: two sets would not fit the registers.
KL_INLINE void accumulate(const Pair<PreparedColumn>& step, VectorSums& to) {
    const PreparedColumn &s = step.x, &t = step.y;
    const VF w_s = exp2_from(s.log_w, s.w), w_t = exp2_from(t.log_w, t.w);
    const VF g_s = g2_from(s.x, s.two_x), g_t = g2_from(t.x, t.two_x);
    to.z += w_s + w_t;
    to.a1 += mad(w_s, s.x, w_t * t.x);
    to.a2 += mad(w_s, g_s, w_t * g_t);
    to.largest_g = max(g_s, max(g_t, to.largest_g));
}

// Logits that weigh nothing, at a d near c.
struct Weightless {
    float a, b;

    Weightless(Reference r, float scale) : a((r.m - 1000) / scale), b((r.m - 1000 + r.c) / scale) {}

    template <class T>
    void pad(ColumnSpan<T>& in) const {
        if (in.rest == 0) return;
        T with_a, with_b;
        round_one(a, with_a);
        round_one(b, with_b);
        in.fill(with_a, with_b);
    }
};

// Takes the columns in which a is -inf out of a sweep. What b has there is left to sweep_lone_b().
struct ColumnMask {
    VF low_a, low_b;
    VF lone_b = splat<VF>(-__builtin_inff());  // the largest b among them

    explicit ColumnMask(const Weightless& low) : low_a(splat<VF>(low.a)), low_b(splat<VF>(low.b)) {}
    KL_INLINE void take_out(VF& a, VF& b) {
        // A NaN or +inf stays where it is, and shows in the sums.
        const VF inf = splat<VF>(__builtin_inff());
        const VI no_a = (a == -inf) & (b < inf);
        lone_b = no_a ? max(b, lone_b) : lone_b;
        a = no_a ? low_a : a;
        b = no_a ? low_b : b;
    }
    bool found_b() const { return largest(lone_b) > -__builtin_inff(); }
};

// The fast path. A NaN or an infinity anywhere makes a sum that is not finite, which is_usable() finds; but
// not what Masked takes out.
template <bool Exact, bool Masked, class T>
inline Sums sweep(const ColumnSpan<T>& in, float scale, Reference reference) {
    const VF k = splat<VF>(scale), m = splat<VF>(reference.m), c = splat<VF>(reference.c);
    VectorSums s, total;
    ColumnMask mask{Weightless(reference, scale)};
    const auto prepare_step = [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        auto a = load_pair(at_a), b = load_pair(at_b);
        if constexpr (Masked) {
            mask.take_out(a.x, b.x);
            mask.take_out(a.y, b.y);
        }
        return Pair<PreparedColumn>{prepare<Exact>(a.x, b.x, k, m, c), prepare<Exact>(a.y, b.y, k, m, c)};
    };
    pipelined(
        in.columns, kStep<T>,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(in.a + i);
            prefetch_step(in.b + i);
            return prepare_step(in.a + i, in.b + i);
        },
        [&](std::int64_t, const Pair<PreparedColumn>& step) KL_INLINE_LAMBDA { accumulate(step, s); }, kRun,
        [&]() KL_INLINE_LAMBDA { total.take(s); });
    if (in.rest > 0) accumulate(prepare_step(in.last_a, in.last_b), s);
    total.take(s);
    return {sum(total.z), sum(total.a1), sum(total.a2), static_cast<double>(largest(s.largest_g)),
            Masked && mask.found_b()};
}

// Columns whose b - a may not be exact in fp32: the difference of two 16-bit logits of bf16 is, or of fp16,
// unless their exponents lie more than 16, or 13, apart.
template <class T>
inline std::int64_t rounded_columns(const ColumnSpan<T>& in) {
    constexpr std::uint16_t most = std::is_same_v<T, Bf16> ? 16 << 7 : 13 << 10;
    VH count{};
    in.for_each_step([&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const VH a = load<VH>(at_a) & INT16_MAX, b = load<VH>(at_b) & INT16_MAX,
                 apart = a > b ? a - b : b - a;
        count -= bits<VH>(apart > most);
    });
    std::int64_t total = 0;
    for (int i = 0; i < kStep<T>; ++i) total += count[i];
    return total;
}

// log2 u of a column, u = 2^(b - m - c), held to what exp2 takes: fma(-3e38, k, ...) is -inf, whose range
// reduction is NaN, and masks of -3e38 are common.
struct WeightOfB {
    VF k, hi, lo;

    WeightOfB(Reference r, VF k_)
        : k(k_), hi(splat<VF>(r.m + r.c)), lo(splat<VF>(-difference_error(-r.m, r.c, -(r.m + r.c)))) {}
    KL_INLINE VF log2_of(VF b) const { return max(fma(b, k, -hi) - lo, splat<VF>(-1000)); }
};

// What b has in the columns that a ColumnMask takes out: sum u and sum u log2 u.
struct LoneB {
    double z, e;
};

template <class T>
inline LoneB sweep_lone_b(const ColumnSpan<T>& in, float scale, Reference reference) {
    const VF minus_inf = splat<VF>(-__builtin_inff()), zero{};
    const WeightOfB weight(reference, splat<VF>(scale));
    VF z{}, e{}, run_z{}, run_e{};
    const auto column = [&](VF a, VF b) KL_INLINE_LAMBDA {
        const VF log_u = weight.log2_of(b), u_ = exp2(log_u),
                 u = (a == minus_inf) & (b > minus_inf) ? u_ : zero;
        run_z += u;
        run_e = mad(u, log_u, run_e);
    };
    in.for_each_step(
        [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
            const auto a = load_pair(at_a), b = load_pair(at_b);
            column(a.x, b.x);
            column(a.y, b.y);
        },
        kEntropyRun,
        [&]() KL_INLINE_LAMBDA {
            z += run_z;
            e += run_e;
            run_z = run_e = zero;
        });
    return {sum(z), sum(e)};
}

// log2 x or up to 0.09 more, x normal: between powers of 2 a logarithm lies above its chord.
inline double log2_above(double x) {
    const auto exponent_and_fraction = static_cast<double>(bits<std::int64_t>(x)) * 0x1p-52;
    return exponent_and_fraction - (1023 - 0.0861);
}

inline bool is_usable(const Sums& s) {
    return s.z < kLargeSum && s.a2 < kLargeSum && std::fabs(s.a1) < kLargeSum && s.largest_g < kLargeG;
}

// The sweep for spans that hold -inf, or an x too large for w * g(x). There w g(x) is taken as
// 2^(b - c - m) - w (1 + x), and columns missing on one side or on both get what the limit gives.
template <class T>
inline State sweep_neg_inf(const ColumnSpan<T>& in, float scale, Reference reference) {
    const VF inf = splat<VF>(__builtin_inff()), zero{}, out_of_range = splat<VF>(kOutOfRange),
             far = splat<VF>(kTailX);
    const VF log2e = splat<VF>(static_cast<float>(kLog2e));
    const VF k = splat<VF>(scale), m = splat<VF>(reference.m), c = splat<VF>(reference.c);
    const WeightOfB weight_of_b(reference, k);
    const VF deepest = splat<VF>(-1000);  // as WeightOfB has it

    VF z{}, a1{}, a2{}, size{}, high = splat<VF>(-1), low{};
    VF run_z{}, run_a1{}, run_a2{};
    const auto end_run = [&]() KL_INLINE_LAMBDA {
        z += run_z;
        a1 += run_a1;
        a2 += run_a2;
        run_z = run_a1 = run_a2 = zero;
    };
    VI bad{}, infinite{}, seen_b{}, large{}, neg_inf{};
    const auto column = [&](VF a, VF b) KL_INLINE_LAMBDA {
        const VI no_a = a == -inf, no_b = b == -inf;
        bad |= ~((a < inf) & (b < inf));
        infinite |= ~no_a & no_b;
        seen_b |= ~no_b;
        neg_inf -= no_a | no_b;
        a = no_a ? zero : a;
        b = no_b ? zero : b;
        large |= (abs(a) > out_of_range) | (abs(b) > out_of_range);
        const VF d = b - a;
        const VF x_ = min(fma(difference_error(b, a, d), k, fma(d, k, -c)), out_of_range);
        const VF x = (no_a | no_b) ? zero : x_;
        const VF w_ = exp2(max(fma(a, k, -m), deepest)), w_b_ = exp2(weight_of_b.log2_of(b));
        const VF w = no_a ? zero : w_, w_b = no_b ? zero : w_b_;
        VF wg = x > far ? (w_b - w) * log2e - w * x : w * g2(min(x, far));
        wg = no_a ? w_b * log2e : wg;
        wg = (no_b & ~no_a) ? -w * log2e : wg;
        run_z += w;
        run_a1 = mad(w, x, run_a1);
        run_a2 += wg;
        size += abs(wg);
        high = max(x, high);
        low = min(x, low);
    };
    in.for_each_step(
        [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
            const auto a = load_pair(at_a), b = load_pair(at_b);
            column(a.x, b.x);
            column(a.y, b.y);
        },
        kRun, end_run);

    State out;
    out.flags = kSawGeneral;
    out.reference = reference;
    out.z = sum(z);
    out.a1 = sum(a1);
    out.a2 = sum(a2);
    out.fp32_sum_z = out.z;
    out.fp32_sum = sum(size);
    out.top_d = static_cast<double>(reference.c + largest(high));
    std::int64_t missing = -in.padding();
    for (int i = 0; i < lanes<VF>; ++i) missing += neg_inf[i];
    if (missing > 0) out.flags |= kSawNegInf;
    if (any<VF>(large)) out.flags |= kSawOutOfRange;
    if (any<VF>(bad)) out.flags |= kSawNan;
    if (any<VF>(infinite)) out.flags |= kSawInfinite;
    if (any<VF>(seen_b)) out.flags |= kSawB;
    if (largest(high) > kTailX) out.flags |= kSawTail;
    if (largest(high) > kLargeX) out.flags |= kSawLargeX;
    if (largest(-low) > -kFarB) out.flags |= kSawFarB;
    // Some instruction sets' exp2 stops at 2^126 where it should overflow.
    if (!(out.z < kLargeSum && std::fabs(out.a2) < kLargeSum)) out.a2 = __builtin_inf();
    return out;
}

// A reference for a span that may hold -inf: the largest finite a, or b's where a has no finite logit.
template <class T>
inline Reference reference_for(const ColumnSpan<T>& in, float scale, float c) {
    VF top_a = splat<VF>(-__builtin_inff()), top_b = top_a;
    in.for_each_step([&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        top_a = max(a.x, max(a.y, top_a));
        top_b = max(b.x, max(b.y, top_b));
    });
    const float a = largest(top_a) * scale, b = largest(top_b) * scale;
    if (std::fabs(a) < __builtin_inff()) return {a, c};
    if (std::fabs(b) < __builtin_inff()) return {b, 0};
    return {0, c};
}

// b - a at the first column that carries weight: near enough to E_a[d] to begin with.
template <class T>
inline float first_shift(const ColumnSpan<T>& in, float scale, float m) {
    const auto search = [&](const T* at_a, const T* at_b, std::int64_t n, float& d) {
        for (std::int64_t i = 0; i < n; ++i) {
            const float a = widen_one(at_a[i]);
            d = (widen_one(at_b[i]) - a) * scale;
            if (a * scale > m - 20 && std::fabs(d) < kOutOfRange) return true;
        }
        return false;
    };
    float d = 0;
    return search(in.a, in.b, in.columns, d) || search(in.last_a, in.last_b, in.rest, d) ? d : 0;
}

// A reference this far (in ln 2) below the mean is too coarse to measure from: 2^54 comes of an exponent that
// was rounded by 2e-6, and it hides the distance itself, since a2 is as large.
constexpr double kFarRebase = 4;

// The part of a2 that the mean's distance from c makes up, twice: errors of what cancels stay below
// kWorstError times what is left.
constexpr double kFarFromMean = 0.8;

// The same where a2 grows with 2^x and hides it: 0.7 nats, that is 1 in units of ln 2. Further off,
// errors of a1 count in the divergence.
constexpr double kNearMean = 1.0;

// A tile that weighs more has its top well above the reference's m, or very many columns above it. The top's
// exponent is rounded by up to a 2^24th of itself, and the normaliser passes that on to every column's
// gradient: the tile is weighed again from a reference near its top.
constexpr double kHeavy = 0x1p16;

// Accumulates the state of a block of columns, tile by tile.
class Accumulator {
public:
    explicit Accumulator(float scale) : scale_(scale) {}

    template <class T>
    void take(ColumnSpan<T> in) {
        if (total_.is_empty()) {
            reference_ = reference_for(in, scale_, 0);
            reference_.c = first_shift(in, scale_, reference_.m);
        }
        State tile = sweep_tile(in, reference_);
        if (tile.z > kHeavy)
            tile = sweep_tile(in, {reference_.m + static_cast<float>(std::ilogb(tile.z)), reference_.c});
        State both = add(tile);
        if (moves_the_mean_far(both)) {
            const Reference to = at_mean(both);
            State rebased = rebase(both, to);
            const auto error = [&] {
                return total_.is_empty() ? rebased.fp32_sum : rebase(tile, to).fp32_sum;
            };
            if (tile.has_mass() && (is_far_from_mean(both) || !(error() <= kWorstError * rebased.a2))) {
                tile = sweep_tile(in, at_mean(tile));
                both = add(tile);
                rebased = rebase(both, at_mean(both));
            }
            both = rebased;
        }
        total_ = both;
        reference_ = both.reference;
    }

    const State& total() const { return total_; }

private:
    static Reference at_mean(const State& s) {
        return {s.reference.m, static_cast<float>(static_cast<double>(s.reference.c) + s.a1 / s.z)};
    }

    // What the next tile is expected to need: the loop for finite columns; the one that takes columns out; or
    // the one for whatever there is.
    enum class Loop { finite, masked, general };

    template <class T>
    State sweep_tile(ColumnSpan<T>& in, Reference reference) {
        // From so large a reference bf16 could not place the padding well below m.
        const bool far_out = std::fabs(reference.m) > 8192 || std::fabs(reference.c) > 8192;
        State out;
        if (expected_ == Loop::finite && !(in.rest > 0 && far_out)) {
            // Where the format cannot place the padding, the sums become inf.
            Weightless(reference, scale_).pad(in);
            if (sweep_fast<false>(in, reference, out)) return out;
        }
        if (in.rest > 0) in.fill(minus_infinity<T>(), minus_infinity<T>());
        if (expected_ != Loop::general && sweep_fast<true>(in, reference, out)) {
            expected_ = Loop::masked;
            return out;
        }
        out = sweep_neg_inf(in, scale_, reference_for(in, scale_, reference.c));
        if (out.reference.m > kHugeA) out.flags |= kSawHugeA;
        expected_ =
            (out.flags & (kSawNegInf | kSawOutOfRange | kSawLargeX)) != 0 ? Loop::general : Loop::finite;
        return out;
    }

    // False where fp32 sums cannot do this span this way.
    template <bool Masked, class T>
    bool sweep_fast(const ColumnSpan<T>& in, Reference reference, State& out) const {
        // The error of fl(b - a) is at most 2^-24 |c|: nothing beside an x that is usually over |c| / 16.
        const auto is_nothing = [&](double share) {
            return 512 * total_.a2 > kLn2 * total_.z * static_cast<double>(reference.c * reference.c) * share;
        };
        const bool any = is_nothing(1);
        bool coarse = any;
        State so_far = total_;
        if constexpr (sizeof(T) == 2) {
            const auto fits = [&](std::int64_t columns) {
                so_far.rounded = total_.rounded + static_cast<double>(columns);
                return is_nothing(rounded_share(so_far));
            };
            coarse = any || fits(in.columns + in.rest) || fits(rounded_columns(in));
        }
        const Sums s =
            coarse ? sweep<false, Masked>(in, scale_, reference) : sweep<true, Masked>(in, scale_, reference);
        if (!is_usable(s)) return false;
        // 2^x = 1 + (x + g) ln 2, and no x is past 48.
        const double top_x = log2_above(kLn2 * s.largest_g + 35);
        out = {reference, s.z, s.a1, s.a2, static_cast<double>(reference.c) + top_x, s.z, s.a2, 0, kSawB};
        if (coarse && !any) out.rounded = so_far.rounded - total_.rounded;
        if (any) out.flags |= kSawRounding;
        if (reference.m > kHugeA) out.flags |= kSawHugeA;
        if (s.largest_g > kTailG) out.flags |= kSawTail;
        if (s.largest_g > kFarTailG) out.flags |= kSawFarTail;
        if (Masked) out.flags |= kSawMasked;
        if (!s.lone_b) return true;
        const double u = sweep_lone_b(in, scale_, reference).z;
        out.a2 += u * kLog2e;
        out.fp32_sum = out.a2;
        out.flags |= kSawNegInf;
        return out.a2 < kLargeSum;
    }

    State add(const State& tile) const {
        if (tile.reference != total_.reference) return merge(total_, tile);
        State out = total_;
        out.add(tile);
        return out;
    }

    // Whether more than two fifths of a2 would cancel in the end if the reference stayed.
    static bool moves_the_mean_far(const State& s) {
        return s.has_mass() && std::isfinite(s.a2) &&
               (std::fabs(s.a1) > kNearMean * s.z || s.a1 * s.a1 * kLn2 > kFarFromMean * s.a2 * s.z);
    }

    static bool is_far_from_mean(const State& s) { return std::fabs(s.a1) > kFarRebase * s.z; }

    float scale_;
    Reference reference_;
    State total_;
    Loop expected_ = Loop::finite;
};

}  // namespace kl::KL_ISA
