#include "pair_state.h"

#include <algorithm>
#include <cmath>

namespace kl {

PairState seen_from(Frame to, const PairState& s) {
    // KL(b||a) is the same state with the sides exchanged: its frame is (m + c, -c).
    const double m = s.frame.m, c = s.frame.c, to_m = to.m, to_c = to.c, rise = m - to_m;
    const State forward = seen_from(to, State{s.frame, s.z, s.a1, s.a2, 0, s.spent_z, s.spent_a, kSawB});
    PairState out = s;
    out.frame = to;
    out.z = forward.z;
    out.a1 = forward.a1;
    out.a2 = forward.a2;
    out.spent_z = forward.spent_z;
    out.spent_a = forward.spent;
    const double weight = std::exp2(rise), rise_b = rise + (c - to_c), weight_b = std::exp2(rise_b);
    const double gap = s.gap(), b1 = -(gap + s.b2);
    const Move move((c - to_c) * kLn2);
    const double of_zb = s.zb * (move.g_of / kLn2);
    out.zb = weight_b * s.zb;
    out.b2 = weight_b * (move.power * s.b2 + move.less_one * b1 + of_zb);
    out.spent_zb = weight_b * s.spent_zb;
    const double of_fp64 = move.power * (std::fabs(gap) + 2 * s.b2) + std::fabs(gap) + of_zb;
    out.spent_b =
        weight_b * (move.error(s.spent_zb, length(s.error_of_gap(), s.spent_b), s.spent_b) + kFp64 * of_fp64);
    out.ea = weight * (s.ea + rise * s.z);
    out.eb = weight_b * (s.eb + rise_b * s.zb);
    return out;
}

Frame centre(const PairState& s) {
    return {s.frame.m, static_cast<float>(static_cast<double>(s.frame.c) + std::log2(s.zb / s.z))};
}

PairState merge(const PairState& s, const PairState& t) {
    if (s.is_empty()) return t;
    if (!s.usable || !t.usable) {
        PairState out = s;
        out.usable = false;
        return out;
    }
    PairState out = s, other = t;
    if (s.frame != t.frame) {
        Frame to = s.frame;
        to.m = std::max(s.frame.m, t.frame.m);
        out = seen_from({to.m, s.frame.c}, s);
        other = seen_from({to.m, s.frame.c}, t);
        const double ratio = (out.zb + other.zb) / (out.z + other.z);
        to.c = static_cast<float>(static_cast<double>(s.frame.c) + std::log2(ratio));
        if (!std::isfinite(to.c)) {
            out.usable = false;
            return out;
        }
        out = seen_from(to, s);
        other = seen_from(to, t);
    }
    out.z += other.z;
    out.a1 += other.a1;
    out.a2 += other.a2;
    out.zb += other.zb;
    out.b2 += other.b2;
    out.ea += other.ea;
    out.eb += other.eb;
    out.spent_z += other.spent_z;
    out.spent_zb += other.spent_zb;
    out.spent_a += other.spent_a;
    out.spent_b += other.spent_b;
    out.flags |= other.flags;
    out.top_a.take(other.top_a);
    out.top_b.take(other.top_b);
    return out;
}

PairResult finish(const PairState& s) {
    PairResult out;
    const double zb = s.zb, gap = s.gap(), m = s.frame.m, c = s.frame.c;
    out.forward = divergence_from(kLn2 * s.a1 / s.z, kLn2 * s.a2 / s.z, kLn2 * gap / s.z);
    out.reverse = divergence_from(-kLn2 * (gap + s.b2) / zb, kLn2 * s.b2 / zb, -kLn2 * gap / zb);
    const double log_z = std::log2(s.z), log_zb = std::log2(zb);
    out.lse_a = m + log_z;
    out.lse_b = m + c + log_zb;
    out.entropy_a = std::max(0.0, kLn2 * (log_z - s.ea / s.z));
    out.entropy_b = std::max(0.0, kLn2 * (log_zb - s.eb / zb));
    // As finish() of one direction has it, and for both; y is seldom far from 0 here. A NaN fails every
    // comparison.
    const auto within = [&](double z, double spent, double y, double kl) {
        const double of_y = kLn2 / z * s.error_of_gap(), of_g = kLn2 / z * spent;
        const double errors =
            std::fabs(y) < 0.5 ? length(of_g, y / (1 + y) * of_y) : length(of_y / (1 + y), of_y, of_g);
        return errors <= kWorstError * kl && y > -1;
    };
    const bool finite = s.usable && s.z > 0 && zb > 0 && std::isfinite(out.forward + out.reverse) &&
                        std::isfinite(out.entropy_a + out.entropy_b) && std::fabs(m) < 0x1p20 &&
                        std::fabs(c) < 0x1p20;
    const bool exact = within(s.z, s.spent_a, kLn2 * gap / s.z, out.forward) &&
                       within(zb, s.spent_b, -kLn2 * gap / zb, out.reverse);
    const double shift = c * kLn2;
    const bool coarse =
        (s.flags & kSawRounding) && 2 * 1024 * std::min(out.forward, out.reverse) < shift * shift;
    out.trusted = finite && exact && !coarse;
    return out;
}

}  // namespace kl
