#include "token_stats/state.h"

#include <algorithm>
#include <cmath>

namespace kl {

PairState rebase(const PairState& s, Reference to) {
    // KL(b||a) is the same state with the sides exchanged: its reference is (m + c, -c).
    const double m = s.reference.m, c = s.reference.c, to_m = to.m, to_c = to.c, rise = m - to_m;
    const State forward =
        rebase(State{s.reference, s.z, s.a1, s.a2, 0, s.fp32_sum_z, s.fp32_sum_a, 0, kSawB}, to);
    PairState out = s;
    out.reference = to;
    out.z = forward.z;
    out.a1 = forward.a1;
    out.a2 = forward.a2;
    out.fp32_sum_z = forward.fp32_sum_z;
    out.fp32_sum_a = forward.fp32_sum;
    const double weight = std::exp2(rise), rise_b = rise + (c - to_c), weight_b = std::exp2(rise_b);
    const double gap = s.gap(), b1 = -(gap + s.b2);
    const Rebase rebased_by((c - to_c) * kLn2);
    const double of_zb = s.zb * (rebased_by.g_of / kLn2);
    out.zb = weight_b * s.zb;
    out.b2 = weight_b * (rebased_by.power * s.b2 + rebased_by.less_one * b1 + of_zb);
    out.fp32_sum_zb = weight_b * s.fp32_sum_zb;
    const double of_fp64 = rebased_by.power * (std::fabs(gap) + 2 * s.b2) + std::fabs(gap) + of_zb;
    out.fp32_sum_b =
        weight_b * (rebased_by.error(s.fp32_sum_zb, length(s.error_of_gap(), s.fp32_sum_b), s.fp32_sum_b) +
                    kFp64 * of_fp64);
    out.ea = weight * (s.ea + rise * s.z);
    out.eb = weight_b * (s.eb + rise_b * s.zb);
    return out;
}

Reference centre(const PairState& s) {
    return {s.reference.m, static_cast<float>(static_cast<double>(s.reference.c) + std::log2(s.zb / s.z))};
}

PairState merge(const PairState& s, const PairState& t) {
    if (s.is_empty()) return t;
    if (t.is_empty()) return s;
    if (!s.usable || !t.usable) {
        PairState out = s;
        out.usable = false;
        return out;
    }
    PairState out = s, other = t;
    if (s.reference != t.reference) {
        Reference to = s.reference;
        to.m = std::max(s.reference.m, t.reference.m);
        out = rebase(s, {to.m, s.reference.c});
        other = rebase(t, {to.m, s.reference.c});
        const double ratio = (out.zb + other.zb) / (out.z + other.z);
        to.c = static_cast<float>(static_cast<double>(s.reference.c) + std::log2(ratio));
        if (!std::isfinite(to.c)) {
            out.usable = false;
            return out;
        }
        out = rebase(s, to);
        other = rebase(t, to);
    }
    out.z += other.z;
    out.a1 += other.a1;
    out.a2 += other.a2;
    out.zb += other.zb;
    out.b2 += other.b2;
    out.ea += other.ea;
    out.eb += other.eb;
    out.fp32_sum_z += other.fp32_sum_z;
    out.fp32_sum_zb += other.fp32_sum_zb;
    out.fp32_sum_a += other.fp32_sum_a;
    out.fp32_sum_b += other.fp32_sum_b;
    out.flags |= other.flags;
    out.top_a.take(other.top_a);
    out.top_b.take(other.top_b);
    return out;
}

PairResult finish(const PairState& s) {
    PairResult out;
    const double zb = s.zb, gap = s.gap(), m = s.reference.m, c = s.reference.c;
    out.forward = divergence_from(kLn2 * s.a1 / s.z, kLn2 * s.a2 / s.z, kLn2 * gap / s.z);
    out.reverse = divergence_from(-kLn2 * (gap + s.b2) / zb, kLn2 * s.b2 / zb, -kLn2 * gap / zb);
    const bool infinite = (s.flags & kSawInfinite) != 0;
    if (infinite) out.reverse = std::numeric_limits<double>::infinity();
    const double log_z = std::log2(s.z), log_zb = std::log2(zb);
    out.lse_a = m + log_z;
    out.lse_b = m + c + log_zb;
    // Columns far from the reference make a1 and a2 large, which cancel in a small gap: enough for KLs as
    // large, but not for a js that is not.
    const bool by_masses = s.error_of_gap() > s.error_of_masses();
    out.shift = c + (by_masses ? log_zb - log_z : std::log1p(kLn2 * gap / s.z) / kLn2);
    out.entropy_a = std::max(0.0, kLn2 * (log_z - s.ea / s.z));
    out.entropy_b = std::max(0.0, kLn2 * (log_zb - s.eb / zb));
    // As finish() of one direction has it, and for both; y is seldom far from 0 here. A NaN fails every
    // comparison.
    const auto within = [&](double z, double fp32_sum, double y, double kl) {
        const double of_y = kLn2 / z * s.error_of_gap(), of_g = kLn2 / z * fp32_sum;
        const double errors =
            std::fabs(y) < 0.5 ? length(of_g, y / (1 + y) * of_y) : length(of_y / (1 + y), of_y, of_g);
        return errors <= kWorstError * kl && y > -1;
    };
    const bool finite = s.usable && s.z > 0 && zb > 0 && std::isfinite(out.forward) &&
                        (infinite || std::isfinite(out.reverse)) &&
                        std::isfinite(out.entropy_a + out.entropy_b) && std::fabs(m) < 0x1p20 &&
                        std::fabs(c) < 0x1p20;
    const bool exact = within(s.z, s.fp32_sum_a, kLn2 * gap / s.z, out.forward) &&
                       (infinite || within(zb, s.fp32_sum_b, -kLn2 * gap / zb, out.reverse));
    const double shift = c * kLn2;
    const bool coarse =
        (s.flags & kSawRounding) && 2 * 1024 * std::min(out.forward, out.reverse) < shift * shift;
    out.trusted = finite && exact && !coarse;
    return out;
}

}  // namespace kl
