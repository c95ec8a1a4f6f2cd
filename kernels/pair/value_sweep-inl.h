// The value's sweep: one read of a span of columns in fp32, whatever 16- or 32-bit format holds them.
//
// It goes tile by tile, each small enough to come from L1 when it is read a second time, with the
// reference (m, c) fixed inside a tile. The reference that suits the first tile need not suit the row: real
// teachers put most of their mass on a few tokens in some other tile, and measured from a c that is far
// from E_a[d] almost all of a2 would cancel in the end. So a tile that moves the mean far
// is swept again, from its own mean. That happens about ln(#tiles) times in a row.
//
// A tile takes the loop for near columns, or the one that leaves far ones to sweep_far(): those missing on a
// side, and those whose d lies too far from c for a sum from there. How those enter a state: pair/state.h.
#pragma once

#include <cmath>

#include "pair/column_span-inl.h"
#include "pair/state.h"
#include "simd/elementary-inl.h"

namespace kl::KL_ISA {

// Past this |x| a column is far: there b's weight beside a's, or a's beside b's, is nothing.
constexpr float kFarX = static_cast<float>(-kLoneX);
// Past this x the rounding of 2^x shows in lse(b) where a column holds more of b's mass than this part of it;
// less is one of very many.
constexpr float kNearX = 16;
constexpr double kLittle = 0x1p-8;
// g2(kNearX), which g2 reaches at an x of -2^16 as well; and g2(-kFarX).
constexpr double kTailG = 0x1p16 * kLog2e, kLowG = -kLoneX;
// For the sweep of token statistics.
constexpr double kFarTailG = 0x1p32 * kLog2e;
constexpr float kHugeA = 0x1p20f, kFarB = -0x1p20f;
constexpr double kLargeSum = 0x1p100;

constexpr float kOutOfRange = 0x1p100f;  // beyond it products with log2(e) / temperature may overflow

struct Sums {
    double z, a1, a2, largest_g;
    std::uint64_t far_steps;  // a bit for each step that holds columns for sweep_far(), but for the copy
    bool masked;              // -inf on both sides in a column outside the copy
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

// A column's place: log2 of its weight, and its distance x from the reference's c. Exact keeps the rounding
// error of b - a too.
struct Place {
    VF log_w, x;
};
template <bool Exact>
KL_INLINE Place place(VF a, VF b, VF k, VF m, VF c) {
    const VF d = b - a;
    VF x = fma(d, k, -c);
    if constexpr (Exact) x = fma(difference_error(b, a, d), k, x);
    return {fma(a, k, -m), g2_domain(x)};
}

KL_INLINE VI is_far(const Place& s, float little) {
    return ~(abs(s.x) <= splat<VF>(kFarX)) |
           ((s.x > splat<VF>(kNearX)) & (s.log_w + s.x > splat<VF>(little)));
}
// False only where no column of both vectors is.
KL_INLINE bool may_be_far(const Place& s, const Place& t, float little) {
    const VF most = splat<VF>(kFarX), b = max(s.log_w + s.x, t.log_w + t.x);
    return any<VF>(~(abs(s.x) <= most) | ~(abs(t.x) <= most) |
                   ((max(s.x, t.x) > splat<VF>(kNearX)) & (b > splat<VF>(little))));
}

// Both after the range reduction: a column before the polynomials.
struct PreparedColumn {
    VF log_w, x;
    Reduced<VF> w, two_x;
};
KL_INLINE PreparedColumn prepare(const Place& s) {
    return {s.log_w, s.x, reduce(clamp_exponent(s.log_w)), reduce(clamp_exponent(s.x))};
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

// The fast path. A NaN or an infinity anywhere makes a sum that is not finite, which is_usable() finds; where
// SkipFar they are far columns, and weigh nothing here.
template <bool Exact, bool SkipFar, class T>
inline Sums sweep(const ColumnSpan<T>& in, float scale, Reference reference, [[maybe_unused]] float little) {
    const VF k = splat<VF>(scale), m = splat<VF>(reference.m), c = splat<VF>(reference.c);
    VectorSums s, total;
    std::uint64_t far_steps = 0;
    bool masked = false;
    const auto prepare_step = [&](const T* at_a, const T* at_b, std::uint64_t step) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        Place s = place<Exact>(a.x, b.x, k, m, c), t = place<Exact>(a.y, b.y, k, m, c);
        if constexpr (SkipFar) {
            if (may_be_far(s, t, little)) [[unlikely]] {
                const VI far_s = is_far(s, little), far_t = is_far(t, little);
                const VF nothing = splat<VF>(-1000), zero{}, minus_inf = splat<VF>(-__builtin_inff());
                const VI no_s = (a.x == minus_inf) & (b.x == minus_inf),
                         no_t = (a.y == minus_inf) & (b.y == minus_inf);
                if (any<VF>((far_s & ~no_s) | (far_t & ~no_t))) far_steps |= step;
                if (any<VF>(no_s | no_t)) masked = masked || step != 0;
                s = {far_s ? nothing : s.log_w, far_s ? zero : s.x};
                t = {far_t ? nothing : t.log_w, far_t ? zero : t.x};
            }
        }
        return Pair<PreparedColumn>{prepare(s), prepare(t)};
    };
    pipelined(
        in.columns, kStep<T>,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(in.a + i);
            prefetch_step(in.b + i);
            return prepare_step(in.a + i, in.b + i, std::uint64_t{1} << (i / kStep<T>));
        },
        [&](std::int64_t, const Pair<PreparedColumn>& step) KL_INLINE_LAMBDA { accumulate(step, s); }, kRun,
        [&]() KL_INLINE_LAMBDA { total.take(s); });
    if (in.rest > 0) accumulate(prepare_step(in.last_a, in.last_b, 0), s);
    total.take(s);
    return {sum(total.z), sum(total.a1), sum(total.a2), static_cast<double>(largest(s.largest_g)),
            far_steps,    masked};
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

// u = 2^(b - m - c) of a column, to 2.5 ulp however large, and its logarithm. m + c comes in two parts, of
// which the high one is so coarse that an integer can be added to it.
struct WeightOfB {
    VF k, hi, lo, lowest;

    WeightOfB(Reference r, VF k_) : k(k_) {
        const double sum = static_cast<double>(r.m) + static_cast<double>(r.c);
        const float high = std::fabs(sum) < 2048 ? static_cast<float>(static_cast<int>(sum * 4096)) / 4096
                                                 : static_cast<float>(sum);
        hi = splat<VF>(high);
        lo = splat<VF>(static_cast<float>(sum - static_cast<double>(high)));
        // fma(-3e38, k, ...) is -inf, whose range reduction is NaN, and masks of -3e38 are common.
        lowest = splat<VF>((high - 1000) / k_[0]);
    }
    KL_INLINE VF log2_of(VF b) const { return fma(max(b, lowest), k, -hi) - lo; }
    KL_INLINE VF of(VF b) const {
        b = max(b, lowest);
        const VF log_u = fma(b, k, -hi);
        Reduced<VF> e = reduce(clamp_exponent(log_u));
        e.r = fma(b, k, -(hi + integer(e))) - lo;
        const VF u = exp2_from(log_u, e);
        return log_u > splat<VF>(120) ? splat<VF>(__builtin_inff()) : u;
    }
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
                 u = ((a == minus_inf) & (b > minus_inf)) ? u_ : zero;
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

inline bool is_usable(const State& s) {
    return s.z < kLargeSum && s.a2 < kLargeSum && std::fabs(s.a1) < kLargeSum && s.lone_z < kLargeSum &&
           std::isfinite(s.lone_x);
}

// The far columns of some steps, to be added to `out`, and in Whole the near ones too. Above c the term w
// g(x) is taken as 2^(b - c - m) - w (1 + x), which is right for a missing a too; below it b has nothing
// here. Gives the number of vectors that hold near ones.
template <bool Exact, bool Whole, class T>
KL_NOINLINE int sweep_far(const ColumnSpan<T>& in, float scale, float little, std::uint64_t steps,
                          State& out) {
    const VF inf = splat<VF>(__builtin_inff()), zero{}, out_of_range = splat<VF>(kOutOfRange);
    const VF log2e = splat<VF>(static_cast<float>(kLog2e)), deepest = splat<VF>(-1000);
    const VF k = splat<VF>(scale), m = splat<VF>(out.reference.m), c = splat<VF>(out.reference.c);
    const WeightOfB weight_of_b(out.reference, k);
    // An x of -3e38 counts down to weights of 2^-200: both are scaled into what fp32 holds.
    const VF small = splat<VF>(0x1p-100f), raised = splat<VF>(80), small_k = k * small, small_c = c * small;
    constexpr double rescale = 0x1p20;

    VF z{}, a1{}, a2{}, lone_z{}, lone_x{}, high = -inf, low{};
    VF run_z{}, run_a1{}, run_a2{}, run_lone_z{}, run_lone_x{};
    VI bad{}, infinite{}, lone_b{}, neither{}, seen_b{}, large{};
    int vectors = 0;
    const auto column = [&](VF a, VF b) KL_INLINE_LAMBDA {
        const VI no_a = a == -inf, no_b = b == -inf;
        bad |= ~((a < inf) & (b < inf));
        neither -= no_a & no_b;
        infinite |= ~no_a & no_b;
        lone_b |= no_a & ~no_b;
        seen_b |= ~no_b;
        const VF log_w = max(fma(a, k, -m), deepest);
        VF w{};
        if (any<VF>(~no_a)) w = no_a ? zero : exp2(log_w);
        if (!any<VF>(~(no_a | no_b))) {  // rows cut to a few tokens have little else
            run_lone_z += w;
            if (any<VF>(~no_b)) run_a2 += no_b ? zero : weight_of_b.of(b) * log2e;
            return;
        }
        const VF d = b - a, x = fma(d, k, -c);
        const Place s = place<Exact>(a, b, k, m, c);
        const VI far = is_far(s, little), above = far & (x > zero), below = far & (x < zero),
                 far_out = below & ~no_b;
        const auto note = [&](VI columns) KL_INLINE_LAMBDA {
            large |= columns & ((abs(a) > out_of_range) | (abs(b) > out_of_range));
        };
        if constexpr (Whole) {
            if (any<VF>(~far)) {
                ++vectors;
                const VF near_w = far ? zero : w, near_x = far ? zero : s.x;
                run_z += near_w;
                run_a1 = mad(near_w, near_x, run_a1);
                run_a2 = mad(near_w, g2(near_x), run_a2);
                high = far ? high : max(s.x, high);
            }
        }
        if (any<VF>(above)) {
            const VF u = weight_of_b.of(b), wx = w * min(x, -deepest);
            run_z += above ? w : zero;
            run_a1 += above ? wx : zero;
            run_a2 += above ? (u - w) * log2e - wx : zero;
            high = (above & ~no_a) ? max(x, high) : high;
            note(above & ~no_a);
        }
        if (any<VF>(below)) run_lone_z += below ? w : zero;
        if (any<VF>(far_out)) {
            const VF raised_w = exp2(log_w + raised);
            run_lone_x -= far_out ? raised_w * fma(d, small_k, -small_c) : zero;
            low = (far_out & (raised_w > zero)) ? min(x, low) : low;
            note(far_out);
        }
    };
    const auto step = [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        column(a.x, b.x);
        column(a.y, b.y);
    };
    const auto end_run = [&]() KL_INLINE_LAMBDA {
        z += run_z;
        a1 += run_a1;
        a2 += run_a2;
        lone_z += run_lone_z;
        lone_x += run_lone_x;
        run_z = run_a1 = run_a2 = run_lone_z = run_lone_x = zero;
    };
    for (int n = 1; steps != 0; steps &= steps - 1, ++n) {
        const std::int64_t i = __builtin_ctzll(steps) * kStep<T>;
        step(in.a + i, in.b + i);
        if (n % kRun == 0) [[unlikely]]
            end_run();
    }
    if (in.rest > 0) step(in.last_a, in.last_b);
    end_run();

    const auto total = [](VF v) { return any<VF>(bits<VI>(v)) ? sum(v) : 0.0; };
    out.z += total(z);
    out.a1 += total(a1);
    out.a2 += total(a2);
    out.fp32_sum_z = out.z;
    out.fp32_sum = out.a2;
    out.lone_z = total(lone_z);
    out.lone_x = total(lone_x) * rescale;
    const double top_d = static_cast<double>(out.reference.c + largest(high));
    out.top_d = top_d > out.top_d ? top_d : out.top_d;
    std::int64_t missing = -in.padding();
    for (int i = 0; i < lanes<VF>; ++i) missing += neither[i];
    if (missing > 0) out.flags |= kSawMasked;
    if (any<VF>(infinite | lone_b)) out.flags |= kSawNegInf;
    if (any<VF>(large)) out.flags |= kSawOutOfRange;
    if (any<VF>(bad)) out.flags |= kSawNan;
    if (any<VF>(infinite)) out.flags |= kSawInfinite;
    if (any<VF>(seen_b)) out.flags |= kSawB;
    if (largest(-low) > -kFarB) out.flags |= kSawFarB;
    return vectors;
}

// A reference for a span of any columns: the largest finite a, or b's where a has no finite logit; and b - a
// at the first column that carries weight on both sides, which is near enough to E_a[d] to begin with.
template <class T>
inline Reference reference_for(const ColumnSpan<T>& in, float scale) {
    VF top_a = splat<VF>(-__builtin_inff()), top_b = top_a;
    in.for_each_step([&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        top_a = max(a.x, max(a.y, top_a));
        top_b = max(b.x, max(b.y, top_b));
    });
    const float m = largest(top_a) * scale, m_b = largest(top_b) * scale;
    if (!(std::fabs(m) < __builtin_inff())) return {std::fabs(m_b) < __builtin_inff() ? m_b : 0, 0};
    const auto search = [&](const T* at_a, const T* at_b, std::int64_t n, float& d) {
        for (std::int64_t i = 0; i < n; ++i) {
            const float a = widen_one(at_a[i]), b = widen_one(at_b[i]);
            d = (b - a) * scale;
            if (a * scale > m - 20 && b * scale > m_b - kFarX && std::fabs(d) < kOutOfRange) return true;
        }
        return false;
    };
    float d = 0;
    return {m, search(in.a, in.b, in.columns, d) || search(in.last_a, in.last_b, in.rest, d) ? d : 0};
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
        if (!total_.has_mass()) reference_ = reference_for(in, scale_);
        State tile = sweep_tile(in, reference_);
        if (tile.z > kHeavy) {
            const Reference r = tile.reference;
            tile = sweep_tile(in, {r.m + static_cast<float>(std::ilogb(tile.z)), r.c});
        }
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

    template <class T>
    State sweep_tile(ColumnSpan<T>& in, Reference reference) {
        // From so large a reference bf16 could not place the padding well below m.
        const bool far_out = std::fabs(reference.m) > 8192 || std::fabs(reference.c) > 8192;
        State out;
        if (expected_ == Loop::near && !(in.rest > 0 && far_out)) {
            // Where the format cannot place the padding, the sums become inf.
            Weightless(reference, scale_).pad(in);
            if (sweep_as<Loop::near>(in, reference, out)) return out;
        }
        if (in.rest > 0) in.fill(minus_infinity<T>(), minus_infinity<T>());
        const auto take = [&](Reference from) {
            return expected_ == Loop::whole ? sweep_as<Loop::whole>(in, from, out)
                                            : sweep_as<Loop::skip_far>(in, from, out);
        };
        // The second reference is the span's own.
        if (!take(reference) && !take(reference_for(in, scale_))) out.a2 = __builtin_inf();
        return out;
    }

    // What the next tile is expected to need: the loop for near columns; the same, which leaves far ones to
    // sweep_far(); or sweep_far() for all, where most are far.
    enum class Loop { near, skip_far, whole };

    // False where fp32 sums cannot do this span this way.
    template <Loop loop, class T>
    bool sweep_as(const ColumnSpan<T>& in, Reference reference, State& out) {
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
        return coarse ? sweep_as<loop, false>(in, reference, any, so_far.rounded, out)
                      : sweep_as<loop, true>(in, reference, any, 0, out);
    }

    template <Loop loop, bool Exact, class T>
    bool sweep_as(const ColumnSpan<T>& in, Reference reference, bool is_rounded, double rounded, State& out) {
        // A tile's column may hold this much of b's mass: the row's so far, or a's.
        const double mass_b = reference == total_.reference ? total_.z + kLn2 * (total_.a1 + total_.a2) : 1;
        const float little = mass_b > 1 ? static_cast<float>(std::ilogb(kLittle * mass_b)) : -8;
        std::uint64_t far_steps = 0;
        bool skips = false;
        out = {};
        out.reference = reference;
        if constexpr (loop != Loop::whole) {
            const Sums s = sweep<Exact, loop == Loop::skip_far>(in, scale_, reference, little);
            // 2^x = 1 + (x + g) ln 2, and no x is past 64.
            const double top_x = log2_above(kLn2 * s.largest_g + 46);
            out = {reference, s.z, s.a1, s.a2, static_cast<double>(reference.c) + top_x, s.z, s.a2};
            // Columns that b nearly lacks pull the mean away from all others.
            if (loop == Loop::near &&
                (s.largest_g > kTailG || (s.largest_g > kLowG && !(s.a1 > -kNearMean * s.z))))
                return false;
            far_steps = s.far_steps;
            skips = s.masked || far_steps != 0 || s.largest_g > kTailG;
            if (s.masked) out.flags |= kSawMasked;
        }
        if (!Exact && !is_rounded) out.rounded = rounded - total_.rounded;
        if (is_rounded) out.flags |= kSawRounding;
        if (reference.m > kHugeA) out.flags |= kSawHugeA;
        if (out.z > 0) out.flags |= kSawB;
        const std::int64_t n = in.columns / kStep<T>;
        if (loop == Loop::whole) {
            const std::uint64_t all = n == 0 ? 0 : ~std::uint64_t{0} >> (64 - n);
            if (sweep_far<Exact, true>(in, scale_, little, all, out) > n / 2) expected_ = Loop::skip_far;
        } else if (loop == Loop::skip_far) {
            expected_ = out.z == 0 ? Loop::whole : skips ? Loop::skip_far : Loop::near;
            if (far_steps != 0 || in.rest > 0) sweep_far<Exact, false>(in, scale_, little, far_steps, out);
        }
        return (out.flags & kSawNan) || is_usable(out);
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
    Loop expected_ = Loop::near;
};

}  // namespace kl::KL_ISA
