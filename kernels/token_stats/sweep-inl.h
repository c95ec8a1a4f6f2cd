// The sweep of token statistics: both KLs, both entropies and both largest logits in one read of a span.
//
// This is the value's sweep (pair/value_sweep-inl.h) with the sums of the other KL, whose weights and terms
// come of the same powers of 2. Its reference goes to where lse(b) - lse(a) lies, since a mean under one side
// alone would make the other direction's sum cancel. A span that fp32 cannot do this way (-inf in b alone,
// NaN, or an x past 32, whose rounding shows in lse(b)) makes the row unusable, and the caller computes each
// KL by itself.
#pragma once

#include "token_stats/state.h"
#include "pair/value_sweep-inl.h"

namespace kl::KL_ISA {

struct PairSums {
    double z, a1, a2, zb, b2, ea, eb, largest_g;
    float top_a, top_b;
    bool lone_b;  // as in Sums
};

struct PairVectorSums {
    VF z{}, a1{}, a2{}, zb{}, b2{}, ea{}, eb{}, largest_g{};

    KL_INLINE void take(PairVectorSums& run) {
        z += run.z;
        a1 += run.a1;
        a2 += run.a2;
        zb += run.zb;
        b2 += run.b2;
        ea += run.ea;
        eb += run.eb;
        run.z = run.a1 = run.a2 = run.zb = run.b2 = run.ea = run.eb = VF{};
    }
};

// One vector's weights and the terms that they multiply.
struct PairTerms {
    VF w, u, x, e;
    BothWays<VF> f;
};

template <bool Exact>
KL_INLINE PairTerms pair_terms(VF a, VF b, VF k, VF m, VF c) {
    const VF d = b - a;
    VF x = fma(d, k, -c);
    if constexpr (Exact) x = fma(difference_error(b, a, d), k, x);
    const VF e = fma(a, k, -m), w = exp2(e);
    const BothWays<VF> f = both_ways(x);
    return {w, w * f.power, x, e, f};
}

// Two vectors at a time into one set of sums: two sets would not fit the registers.
KL_INLINE void accumulate_pair(const PairTerms& s, const PairTerms& t, PairVectorSums& to) {
    to.z += s.w + t.w;
    to.a1 += mad(s.w, s.x, t.w * t.x);
    to.ea += mad(s.w, s.e, t.w * t.e);
    to.a2 += mad(s.w, s.f.g, t.w * t.f.g);
    to.b2 += mad(s.w, s.f.h, t.w * t.f.h);
    to.zb += s.u + t.u;
    to.eb += mad(s.u, s.e + s.x, t.u * (t.e + t.x));
    to.largest_g = max(s.f.g, max(t.f.g, to.largest_g));
}

// A NaN or an infinity anywhere makes a sum that is not finite.
template <bool Exact, bool Masked, class T>
inline PairSums sweep_pair(const ColumnSpan<T>& in, float scale, Reference reference) {
    const VF k = splat<VF>(scale), m = splat<VF>(reference.m), c = splat<VF>(reference.c);
    PairVectorSums s, total;
    ColumnMask mask{Weightless(reference, scale)};
    VF top_a = splat<VF>(-__builtin_inff()), top_b = top_a;
    in.for_each_step(
        [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
            prefetch_step(at_a);
            prefetch_step(at_b);
            auto a = load_pair(at_a), b = load_pair(at_b);
            top_a = max(a.x, max(a.y, top_a));
            top_b = max(b.x, max(b.y, top_b));
            if constexpr (Masked) {
                mask.take_out(a.x, b.x);
                mask.take_out(a.y, b.y);
            }
            accumulate_pair(pair_terms<Exact>(a.x, b.x, k, m, c), pair_terms<Exact>(a.y, b.y, k, m, c), s);
        },
        kEntropyRun, [&]() KL_INLINE_LAMBDA { total.take(s); });
    return {
        sum(total.z),   sum(total.a1),  sum(total.a2),           sum(total.zb),
        sum(total.b2),  sum(total.ea),  sum(total.eb),           static_cast<double>(largest(s.largest_g)),
        largest(top_a), largest(top_b), Masked && mask.found_b()};
}

inline bool is_usable(const PairSums& s) {
    return s.z < kLargeSum && s.a2 < kLargeSum && std::fabs(s.a1) < kLargeSum && s.zb < kLargeSum &&
           s.b2 < kLargeSum && std::fabs(s.ea) < kLargeSum && std::fabs(s.eb) < kLargeSum &&
           s.largest_g < kFarTailG;
}

// Exponents above m are rounded like those below it: past this one m is raised to the span's maximum.
constexpr float kHighE = 8;

class PairAccumulator {
public:
    explicit PairAccumulator(float scale) : scale_(scale) {}

    // `column` is the row's column at which the span begins.
    template <class T>
    void take(ColumnSpan<T> in, std::int64_t column) {
        if (!total_.usable) return;
        if (total_.is_empty()) reference_ = reference_for(in, scale_);
        PairState tile = sweep_tile(in, column, reference_);
        if (!tile.usable) {
            const float m = reference_for(in, scale_).m;
            if (m > reference_.m + kHighE) tile = sweep_tile(in, column, {m, reference_.c});
        }
        if (!tile.usable) {
            total_.usable = false;
            return;
        }
        if (tile.is_empty()) return;
        PairState both = add(tile);
        const float rise = larger(tile.top_a.logit * scale_ - tile.reference.m, 0.0f);
        if (!is_central(both) || rise > kHighE) {
            const Reference to = raised(centre(both), rise);
            const PairState rebased = rebase(both, to);
            const PairState of_tile = total_.is_empty() ? rebased : rebase(tile, to);
            const bool exact = of_tile.fp32_sum_a <= kWorstError * rebased.a2 &&
                               of_tile.fp32_sum_b <= kWorstError * rebased.b2;
            if (!exact || rise > 2 * kHighE || is_far(both)) {
                tile = sweep_tile(in, column, raised(centre(tile), rise));
                if (!tile.usable) {
                    total_.usable = false;
                    return;
                }
                both = add(tile);
                both = rebase(both, raised(centre(both), both.reference.m < tile.reference.m ? rise : 0));
            } else {
                both = rebased;
            }
        }
        if (!std::isfinite(both.reference.c)) both.usable = false;
        total_ = both;
        reference_ = both.reference;
    }

    const PairState& total() const { return total_; }

private:
    static Reference raised(Reference f, float by) { return {f.m + by, f.c}; }

    template <class T>
    PairState sweep_tile(ColumnSpan<T>& in, std::int64_t column, Reference reference) {
        // From so large a reference bf16 could not place the padding well below m.
        const bool far_out = std::fabs(reference.m) > 8192 || std::fabs(reference.c) > 8192;
        PairState out;
        if (!masked_ && !(in.rest > 0 && far_out)) {
            Weightless(reference, scale_).pad(in);
            sweep_fast<false>(in, column, reference, out);
            if (out.usable) return out;
        }
        if (in.rest > 0) in.fill(minus_infinity<T>(), minus_infinity<T>());
        sweep_fast<true>(in, column, reference, out);
        masked_ = out.usable;
        return out;
    }

    template <bool Masked, class T>
    void sweep_fast(const ColumnSpan<T>& in, std::int64_t column, Reference reference, PairState& out) const {
        // As in Accumulator::sweep_fast, for the smaller of both.
        const double limit = kLn2 * static_cast<double>(reference.c * reference.c);
        const bool coarse = 512 * total_.a2 > limit * total_.z && 512 * total_.b2 > limit * total_.zb;
        const PairSums s = coarse ? sweep_pair<false, Masked>(in, scale_, reference)
                                  : sweep_pair<true, Masked>(in, scale_, reference);
        const LoneB lone = s.lone_b ? sweep_lone_b(in, scale_, reference) : LoneB{};
        out.reference = reference;
        out.z = out.fp32_sum_z = s.z;
        out.a1 = s.a1;
        out.a2 = out.fp32_sum_a = s.a2 + lone.z * kLog2e;
        out.zb = out.fp32_sum_zb = s.zb + lone.z;
        out.b2 = out.fp32_sum_b = s.b2;
        out.ea = s.ea;
        out.eb = s.eb + lone.e;
        out.usable = is_usable(s) && out.zb < kLargeSum && (s.z > 0 || lone.z == 0);
        out.top_a = {s.top_a, column, in.columns + in.rest};
        out.top_b = {s.top_b, column, in.columns + in.rest};
        out.flags = (coarse ? kSawRounding : 0u) | (s.lone_b ? kSawInfinite : 0u);
    }

    PairState add(const PairState& tile) const { return merge(total_, tile); }

    // Whether at most two fifths of either sum would cancel in the end if the reference stayed.
    static bool is_central(const PairState& s) {
        const double gap = kLn2 * (s.a1 + s.a2), square = gap * gap;
        return !is_far(s) && square <= kFarFromMean * kLn2 * s.a2 * s.z &&
               square <= kFarFromMean * kLn2 * s.b2 * s.zb;
    }

    // More than 4 (in ln 2) away.
    static bool is_far(const PairState& s) { return !(s.zb < 16 * s.z && s.z < 16 * s.zb); }

    float scale_;
    Reference reference_;
    PairState total_;
    bool masked_ = false;  // the last tile's columns without weight had to be taken out
};

}  // namespace kl::KL_ISA
