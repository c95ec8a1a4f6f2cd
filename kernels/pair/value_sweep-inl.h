// The value's sweep: one read of a span of columns in fp32, whatever 16- or 32-bit format holds them.
//
// It goes tile by tile, each small enough to come from L1 when it is read a second time, with the
// reference (m, c) fixed inside a tile. The reference that suits the first tile need not suit the row: real
// teachers put most of their mass on a few tokens in some other tile, and measured from a c that is far
// from E_a[d] almost all of a2 would cancel in the end. So a tile that moves the mean far
// is swept again, from its own mean. That happens about ln(#tiles) times in a row.
//
// Every tile takes one of several loops, none of which asks anything of a column: for sides near each other,
// for the same with columns missing on both or on either, and for sides far apart (far_sweep-inl.h). The last
// tile's serves the next until that one says otherwise.
#pragma once

#include <cmath>

#include "pair/column_span-inl.h"
#include "pair/far_sweep-inl.h"
#include "pair/state.h"
#include "simd/elementary-inl.h"

namespace kl::KL_ISA {

// g2 of 16, which g2 reaches at an x of -2^16 as well: more is left to the loop that takes any x. Past this x
// the rounding of 2^x shows in lse(b).
constexpr double kTailG = 0x1p16 * kLog2e;
// g2(-64), below which columns that b nearly lacks may pull the mean away from all others.
constexpr double kLowG = 64;
// For the sweep of token statistics.
constexpr double kFarTailG = 0x1p32 * kLog2e;
constexpr float kHugeA = 0x1p20f, kFarB = -0x1p20f;
constexpr double kLargeSum = 0x1p100;

constexpr float kOutOfRange = 0x1p100f;  // beyond it products with log2(e) / temperature may overflow

struct Sums {
    double z, a1, a2;
    double largest_g;
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

// The loops of a tile.
enum class Loop {
    near,       // every logit finite, no x far
    masked,     // the same, but for columns that are -inf on both sides
    one_sided,  // also those that a lacks, or nearly; and where b's logit is the lowest number
    cut,        // the same where D is infinite, and b may lack columns: they count in a's mass alone
    far,        // D is large: the sums of its definition
    lone,       // the same with columns that b lacks, or nearly, kept apart: pair/state.h
};

constexpr bool is_one_sided(Loop loop) { return loop == Loop::one_sided || loop == Loop::cut; }

// Where a lacks a column its weight is taken as 2^-kMostX of b's: then w g2(x) is b's weight, and what w and
// w x add is 3e-8 of it, which D exceeds.
constexpr double kMostX = 30;
// What that g2 is at least, and an x below which a weight that fp32 cannot hold may count.
constexpr double kMostG = 0x1p30, kLowestG = 0x1p40;
// A b that weighs more beside a is left to other sums.
constexpr double kMostB = 32;

// What places columns, as vectors.
template <Loop loop>
struct Places {
    VF k, m, c;
    [[maybe_unused]] VF lowest, most_x, m_of_b;

    Places(float scale, Reference r) : k(splat<VF>(scale)), m(splat<VF>(r.m)), c(splat<VF>(r.c)) {
        if constexpr (is_one_sided(loop)) {
            // Any product with k stays finite. One of most_x and m_of_b makes up for the other's rounding.
            lowest = splat<VF>(-0x1p126f / larger(scale, 1.0f));
            const double both = static_cast<double>(r.m) + static_cast<double>(r.c);
            const auto raised = static_cast<float>(both + kMostX);
            m_of_b = splat<VF>(raised);
            most_x = splat<VF>(static_cast<float>(static_cast<double>(raised) - both));
        } else if constexpr (loop == Loop::masked) {
            lowest = splat<VF>(-__FLT_MAX__);
        }
    }
};

// A column's place: log2 of its weight, and its distance x from the reference's c. Exact keeps the rounding
// error of b - a too.
struct Place {
    VF log_w, x;
};
template <bool Exact, Loop loop>
KL_INLINE Place place(VF a, VF b, const Places<loop>& at) {
    if constexpr (loop != Loop::near) {
        // Where both are -inf they are equal now, and weigh nothing. NaN stays what it is.
        a = max(at.lowest, a);
        b = max(at.lowest, b);
    }
    const VF d = b - a;
    VF x = fma(d, at.k, -at.c), log_w = fma(a, at.k, -at.m);
    if constexpr (Exact) x = fma(difference_error(b, a, d), at.k, x);
    if constexpr (is_one_sided(loop)) {
        x = min(at.most_x, x);
        if constexpr (loop == Loop::cut) x = max(-at.most_x, x);
        log_w = max(fma(b, at.k, -at.m_of_b), log_w);
    }
    return {log_w, g2_domain(x)};
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
template <Loop loop>
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

// A NaN anywhere makes a sum that is not finite, and so does an infinity that the loop is not made for.
template <bool Exact, Loop loop, class T>
inline Sums sweep(const ColumnSpan<T>& in, float scale, Reference reference) {
    const Places<loop> places(scale, reference);
    VectorSums s, total;
    const auto prepare_step = [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        return Pair<PreparedColumn>{prepare(place<Exact>(a.x, b.x, places)),
                                    prepare(place<Exact>(a.y, b.y, places))};
    };
    pipelined(
        in.columns, kStep<T>,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(in.a + i);
            prefetch_step(in.b + i);
            return prepare_step(in.a + i, in.b + i);
        },
        [&](std::int64_t, const Pair<PreparedColumn>& step) KL_INLINE_LAMBDA { accumulate<loop>(step, s); },
        kRun, [&]() KL_INLINE_LAMBDA { total.take(s); });
    if (in.rest > 0) accumulate<loop>(prepare_step(in.last_a, in.last_b), s);
    total.take(s);
    return {sum(total.z), sum(total.a1), sum(total.a2), static_cast<double>(largest(s.largest_g))};
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

inline bool is_usable(const State& s) {
    return s.z < kLargeSum && s.a2 < kLargeSum && std::fabs(s.a1) < kLargeSum && s.lone_z < kLargeSum &&
           std::isfinite(s.lone_x);
}

// NaN or +inf.
template <class T>
KL_NOINLINE bool has_nan(const ColumnSpan<T>& in) {
    const VF inf = splat<VF>(__builtin_inff());
    VI bad{};
    in.for_each_step([&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        bad |= ~((a.x < inf) & (b.x < inf) & (a.y < inf) & (b.y < inf));
    });
    return any<VF>(bad);
}

// A reference for a span of any columns: the largest finite a, or b's where a has no finite logit; and b - a
// at the first column that carries weight on both sides, which is near enough to E_a[d] to begin with.
template <class T>
inline Reference reference_for(const ColumnSpan<T>& in, float scale, float* top_of_b = nullptr) {
    VF top_a = splat<VF>(-__builtin_inff()), top_b = top_a;
    in.for_each_step([&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        top_a = max(a.x, max(a.y, top_a));
        top_b = max(b.x, max(b.y, top_b));
    });
    const float m = largest(top_a) * scale, m_b = largest(top_b) * scale;
    if (top_of_b && std::fabs(m_b) < __builtin_inff()) *top_of_b = larger(*top_of_b, m_b);
    if (!(std::fabs(m) < __builtin_inff())) return {std::fabs(m_b) < __builtin_inff() ? m_b : 0, 0};
    const auto search = [&](const T* at_a, const T* at_b, std::int64_t n, float& d) {
        for (std::int64_t i = 0; i < n; ++i) {
            const float a = widen_one(at_a[i]), b = widen_one(at_b[i]);
            d = (b - a) * scale;
            if (a * scale > m - 20 && b * scale > m_b - 64 && std::fabs(d) < kOutOfRange) return true;
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

// The same of b, in the sums for far sides, as its logarithm.
constexpr float kHighB = 16;

// Accumulates the state of a block of columns, tile by tile.
class Accumulator {
public:
    explicit Accumulator(float scale) : scale_(scale) {}

    template <class T>
    void take(ColumnSpan<T> in) {
        if (total_.flags & kSawNan) return;
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
        if (tile.rounded_z > 0 && is_too_rounded(both)) {
            exact_ = true;
            tile = sweep_tile(in, both.reference);
            exact_ = false;
            both = add(tile);
        }
        total_ = both;
        reference_ = both.reference;
        expect_next(tile);
    }

    const State& total() const { return total_; }

private:
    static Reference at_mean(const State& s) {
        return {s.reference.m, static_cast<float>(static_cast<double>(s.reference.c) + s.a1 / s.z)};
    }

    template <class T>
    State sweep_tile(ColumnSpan<T>& in, Reference reference) {
        State out;
        // From so large a reference bf16 could not place the padding well below m.
        const bool far_out = std::fabs(reference.m) > 8192 || std::fabs(reference.c) > 8192;
        if (expected_ == Loop::near) {
            if (!(in.rest > 0 && far_out)) {
                // Where the format cannot place the padding, the sums become inf.
                Weightless(reference, scale_).pad(in);
                if (sweep_as<Loop::near>(in, reference, out)) return out;
            }
            // What is finite holds no -inf.
            const bool all_finite = std::isfinite(out.a2) && out.z > 0;
            expected_ = !all_finite ? Loop::masked : total_.has_mass() ? Loop::far : Loop::one_sided;
        }
        if (in.rest > 0) in.fill(minus_infinity<T>(), minus_infinity<T>());
        // The second reference is the span's own, the third is where the sums for far sides found its mean.
        mean_ = reference;
        if (!sweep_padded(in, reference, out) && !sweep_padded(in, reference_for(in, scale_, &top_b_), out) &&
            !sweep_padded(in, mean_, out)) {
            out.a2 = __builtin_inf();
            if (has_nan(in)) out.flags |= kSawNan;
        }
        return out;
    }

    // By the loop that is expected to serve, or by the next that does.
    template <class T>
    bool sweep_padded(const ColumnSpan<T>& in, Reference reference, State& out) {
        State apart;
        const auto serves = [&]<Loop loop>() {
            expected_ = loop;
            const bool good = sweep_as<loop>(in, reference, out);
            if (loop == Loop::lone) apart = out;
            return good;
        };
        const bool was_far = expected_ == Loop::far || expected_ == Loop::lone;
        if (expected_ == Loop::far && serves.template operator()<Loop::far>()) return true;
        if (was_far && serves.template operator()<Loop::lone>()) return true;
        if (!is_one_sided(expected_) && serves.template operator()<Loop::masked>()) {
            if (was_far) expected_ = Loop::near;
            return true;
        }
        const bool is_infinite = total_.flags & kSawInfinite;
        if (is_infinite ? serves.template operator()<Loop::cut>()
                        : serves.template operator()<Loop::one_sided>())
            return true;
        const State near = out;
        if (!was_far && serves.template operator()<Loop::lone>()) {
            // The sums for far sides hold lse(b) - lse(a) only as well as any sum.
            if (!(out.flags & kSawInfinite) || is_infinite || !serves.template operator()<Loop::cut>()) {
                expected_ = Loop::lone;
                out = apart;
            }
            out.flags |= apart.flags;
            return true;
        }
        expected_ = Loop::near;
        out = near;
        const bool has_sums = is_usable(apart) && apart.reference == reference;
        if (has_sums && apart.has_mass()) mean_ = at_mean(apart);
        // What b lacks beside a weight too small for fp32 must be nothing.
        const bool hides_something =
            !has_sums || (apart.flags & kSawInfinite) || !(apart.lone_x < 0x1p-30 * near.a2);
        return is_usable(near) && !((near.flags & kSawFarB) && hides_something);
    }

    // Far sides, as the tile and the row have them, take the loop for those next. It finds out itself where
    // they are near each other after all.
    void expect_next(const State& tile) {
        constexpr double margin = 1.3;
        if (is_one_sided(expected_) && !(tile.flags & kSawNegInf)) expected_ = Loop::masked;
        if (expected_ == Loop::lone && !tile.has_mass() && tile.lone_z == 0 && total_.has_mass())
            expected_ = Loop::one_sided;
        if (expected_ == Loop::far || expected_ == Loop::lone) return;
        const auto is_far_itself = [](const State& s) {
            return kLn2 * s.a2 > s.z && is_far(s, least_flow(s), margin);
        };
        if (is_far_itself(tile) && is_far_itself(total_)) expected_ = Loop::far;
    }

    // Either the tile is far, or its mass is so little beside the row's D that it may be.
    bool is_far_enough(const State& tile) const {
        if (is_far(tile, least_flow(tile), 1)) return true;
        const State both = add(tile);
        return is_far(both, least_flow(both), 1);
    }

    // False where fp32 sums cannot do this span this way.
    template <Loop loop, class T>
    bool sweep_as(const ColumnSpan<T>& in, Reference reference, State& out) {
        // The error of fl(b - a) is at most 2^-24 |c|: nothing beside an x that is usually over |c| / 16.
        const double c2 = kLn2 * static_cast<double>(reference.c * reference.c);
        const auto is_nothing = [&](double mass) { return 512 * total_.a2 > c2 * mass; };
        double rounded = __builtin_inf();
        // Nor does it matter where D is infinite.
        bool coarse = is_nothing(total_.z) || (total_.flags & kSawInfinite);
        if constexpr (sizeof(T) == 2) {
            const auto fits = [&](std::int64_t columns) {
                rounded = rounded_mass(reference, static_cast<double>(columns));
                return is_nothing(total_.rounded_z + rounded);
            };
            coarse = coarse || fits(in.columns + in.rest) || fits(rounded_columns(in));
        }
        if (!coarse || exact_) return sweep_as<loop, true>(in, reference, 0, out);
        return sweep_as<loop, false>(in, reference, rounded, out);
    }

    template <Loop loop, bool Exact, class T>
    bool sweep_as(const ColumnSpan<T>& in, Reference reference, double rounded, State& out) {
        bool serves = true;
        if constexpr (loop == Loop::far || loop == Loop::lone) {
            const double of_b = static_cast<double>(reference.m) + static_cast<double>(reference.c);
            for (bool again = true; again;) {
                const float m_b = larger(static_cast<float>(of_b), top_b_);
                serves = sweep_far<Exact, loop == Loop::lone>(in, scale_, reference, m_b, out);
                const double u = out.z + kLn2 * (out.a1 + out.a2);
                const float above = serves && u > 0 ? static_cast<float>(of_b + std::log2(u)) : m_b;
                again = above > m_b + kHighB;
                if (again) top_b_ = above;
            }
            serves = serves && is_far_enough(out);
        } else {
            const Sums s = sweep<Exact, loop>(in, scale_, reference);
            const double c = static_cast<double>(reference.c);
            out = {};
            out.reference = reference;
            out.z = out.fp32_sum_z = s.z;
            out.a1 = s.a1;
            out.a2 = out.fp32_sum = s.a2;
            // Columns that b nearly lacks pull the mean away from all others.
            const bool is_pulled = !(s.a1 > -kNearMean * s.z);
            serves = !((loop == Loop::cut || s.largest_g > kLowG) && is_pulled);
            if (loop != Loop::near) out.flags |= kSawMasked;
            // 2^x = 1 + (x + g) ln 2, and no x is past 64.
            out.top_d = c + log2_above(kLn2 * s.largest_g + 46);
            if (!is_one_sided(loop)) {
                serves = serves && !(s.largest_g > kTailG);
            } else if (s.largest_g > kMostG) {
                out.flags |= kSawNegInf;
                out.top_d = __builtin_inf();
                // The weights that stand for none must stay nothing beside a's.
                const double beside = reference == total_.reference ? total_.z : 0;
                if (!(s.a2 < kMostB * (s.z + beside))) out.a2 = __builtin_inf();
                if (!(s.largest_g < kLowestG)) out.flags |= kSawFarB;
                serves = serves && !(out.flags & kSawFarB);
            }
        }
        out.rounded_z = smaller(rounded, out.z + out.lone_z);
        if (reference.m > kHugeA) out.flags |= kSawHugeA;
        if (out.z > 0) out.flags |= kSawB;
        return serves && is_usable(out);
    }

    State add(const State& tile) const {
        if (tile.reference != total_.reference) return merge(total_, tile);
        State out = total_;
        out.add(tile);
        return out;
    }

    // What finish() will ask, by half.
    static bool is_too_rounded(const State& s) {
        const double c = static_cast<double>(s.reference.c);
        return !(s.flags & kSawInfinite) && 1024 * kLn2 * s.a2 < c * c * s.rounded_z;
    }

    // Whether more than two fifths of a2 would cancel in the end if the reference stayed.
    static bool moves_the_mean_far(const State& s) {
        // What others than those that b lacks add to an infinite D is rounding.
        if ((s.flags & kSawInfinite) && std::fabs(s.a1) <= kNearMean * s.z) return false;
        return s.has_mass() && std::isfinite(s.a2) &&
               (std::fabs(s.a1) > kNearMean * s.z || s.a1 * s.a1 * kLn2 > kFarFromMean * s.a2 * s.z);
    }

    static bool is_far_from_mean(const State& s) { return std::fabs(s.a1) > kFarRebase * s.z; }

    float scale_;
    Reference reference_, mean_;
    State total_;
    Loop expected_ = Loop::near;
    float top_b_ = -__builtin_inff();  // about the largest b, once the sums for far sides asked for it
    bool exact_ = false;               // rounding b - a was found to show in this tile
};

}  // namespace kl::KL_ISA
