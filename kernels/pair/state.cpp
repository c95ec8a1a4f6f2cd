#include "pair/state.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace kl {

namespace {

// 1/12! ... 1/2!
constexpr auto kInverseFactorials = [] {
    std::array<double, 11> out{};
    double factorial = 1;
    for (int n = 2; n <= 12; ++n) out[static_cast<std::size_t>(12 - n)] = 1 / (factorial *= n);
    return out;
}();

double g_series(double x) {
    double total = 0;
    for (const double coefficient : kInverseFactorials) total = total * x + coefficient;
    return total * x * x;
}

bool is_in_series(double x) { return std::fabs(x) <= 0.25; }

}  // namespace

double g(double x) { return is_in_series(x) ? g_series(x) : std::expm1(x) - x; }

// Of 1 + less_one nothing would be left where h is 40.
Rebase::Rebase(double h)
    : less_one(std::expm1(-h)),
      power(h > 1 ? std::exp(-h) : 1 + less_one),
      g_of(is_in_series(h) ? g_series(-h) : less_one + h) {}

double Rebase::error(double z, double of_a1, double of_a2) const {
    return length(power * of_a2, less_one * of_a1, z * (g_of / kLn2));
}

namespace {

// At least E|x| in nats, from E[x] and G = E[g(x)]: |x| <= sqrt(2 g) + g whatever its sign; and where x > 0,
// e^x = 1 + x + g <= 1 + g + sqrt(2 g), which says more of a large g. Both right sides are concave in g.
double mean_size(double mean_x, double mean_g) {
    const double root = std::sqrt(2 * std::max(mean_g, 0.0));
    if (!(mean_g > 1)) return root + mean_g;
    return std::min(root + mean_g, 2 * std::log1p(mean_g + root) + std::fabs(mean_x));
}

}  // namespace

double size_of_a1(double fp32_sum_z, double a1, double fp32_sum) {
    return fp32_sum_z > 0
               ? (fp32_sum_z / kLn2) * mean_size(kLn2 * a1 / fp32_sum_z, kLn2 * fp32_sum / fp32_sum_z)
               : 0;
}

namespace {

// Beyond this h (in nats) of the three terms that make up a2 one is all, and another may overflow.
constexpr double kFarH = 40;

// rebase() by way of sum 2^b, which is what a2 is made of where c goes far.
State rebase_far(const State& s, Reference to) {
    State out = s;
    out.reference = to;
    const double step = static_cast<double>(to.c) - static_cast<double>(s.reference.c),
                 rise = static_cast<double>(s.reference.m) - static_cast<double>(to.m);
    const double weight = std::exp2(rise), weight_of_b = std::exp2(rise - step),
                 u = weight_of_b * (s.z + kLn2 * (s.a1 + s.a2));
    out.z = weight * s.z;
    out.a1 = weight * (s.a1 - step * s.z);
    out.a2 = (u - out.z) / kLn2 - out.a1;
    out.fp32_sum_z = weight * s.fp32_sum_z;
    const double of_a1 = size_of_a1(s.fp32_sum_z, s.a1, s.fp32_sum), of_z = s.fp32_sum_z;
    out.fp32_sum = length(weight_of_b * s.fp32_sum, (step > 0 ? weight : weight_of_b) * of_a1,
                          (step > 0 ? weight * step : weight_of_b) * of_z);
    out.lone_z = weight * s.lone_z;
    out.lone_x = weight * (s.lone_x + step * s.lone_z);
    out.far_sum = weight * s.far_sum;
    out.rounded_z = weight * s.rounded_z;
    return out;
}

// The same span with all that a has in it as columns that b lacks, and b's mass as that of others.
State set_apart(const State& s) {
    State out = s;
    out.z = out.a1 = out.fp32_sum_z = 0;
    out.a2 = s.z / kLn2 + s.a1 + s.a2;
    out.lone_z += s.z;
    out.lone_x -= s.a1;
    out.far_sum += s.fp32_sum_z + size_of_a1(s.fp32_sum_z, s.a1, s.fp32_sum);
    return out;
}

}  // namespace

State rebase(const State& s, Reference to) {
    const double distance = static_cast<double>(to.c) - static_cast<double>(s.reference.c);
    if (std::fabs(distance) * kLn2 > kFarH) return rebase_far(s, to);
    State out = s;
    out.reference = to;
    const double step = static_cast<double>(to.c) - static_cast<double>(s.reference.c), h = step * kLn2;
    const double rise = static_cast<double>(s.reference.m) - static_cast<double>(to.m);
    out.lone_x += step * s.lone_z;
    if (h != 0) {
        out.a1 = s.a1 - step * s.z;
        const Rebase rebased_by(h);
        const double of_a2 = rebased_by.power * s.a2, of_a1 = rebased_by.less_one * s.a1,
                     of_z = s.z * (rebased_by.g_of / kLn2);
        out.a2 = of_a2 + of_a1 + of_z;
        out.fp32_sum =
            rebased_by.error(s.fp32_sum_z, size_of_a1(s.fp32_sum_z, s.a1, s.fp32_sum), s.fp32_sum) +
            kFp64 * (std::fabs(of_a2) + std::fabs(of_a1) + of_z);
    }
    if (rise == 0) return out;
    const double weight = std::exp2(rise);
    out.z *= weight;
    out.a1 *= weight;
    out.a2 *= weight;
    out.fp32_sum_z *= weight;
    out.fp32_sum *= weight;
    out.lone_z *= weight;
    out.lone_x *= weight;
    out.far_sum *= weight;
    out.rounded_z *= weight;
    return out;
}

// Spans whose c lie further from each other have no mean that would serve both.
constexpr double kFarApart = 64;

State merge(const State& s, const State& t) {
    State out = s;
    if (s.is_empty() || t.is_empty()) {
        out = s.is_empty() ? t : s;
        out.flags = s.flags | t.flags;
        out.top_d = std::max(s.top_d, t.top_d);
        return out;
    }
    Reference to = s.reference;
    if (s.has_mass() && t.has_mass()) {
        to.m = s.reference.m > t.reference.m ? s.reference.m : t.reference.m;
        const auto mass = [&](const State& u) {
            return u.z * std::exp2(static_cast<double>(u.reference.m) - static_cast<double>(to.m));
        };
        const double zs = mass(s), zt = mass(t), cs = static_cast<double>(s.reference.c),
                     ct = static_cast<double>(t.reference.c);
        if (std::fabs(ct - cs) > kFarApart) {
            // Either a has nothing of note where b has more, or b has nothing where it has less.
            const bool s_is_low = cs < ct;
            const State &low = s_is_low ? s : t, &high = s_is_low ? t : s;
            const bool is_all = (s_is_low ? zt : zs) < 0x1p-60 * (s_is_low ? zs : zt);
            to.c = is_all ? low.reference.c : high.reference.c;
            State of_low = rebase(is_all ? low : set_apart(low), to);
            const State of_high = rebase(high, to);
            out = s_is_low ? of_low : of_high;
            out.add(s_is_low ? of_high : of_low);
            return out;
        }
        to.c = static_cast<float>(cs + (ct - cs) * (zt / (zs + zt)));
    } else if (t.has_mass()) {
        to = t.reference;
    }
    out = rebase(s, to);
    out.add(rebase(t, to));
    return out;
}

double divergence_from(double mean_x, double mean_g) {
    return divergence_from(mean_x, mean_g, mean_x + mean_g);
}

double divergence_from(double mean_x, double mean_g, double y) {
    const double kl = std::fabs(y) < 0.5 ? mean_g + (std::log1p(y) - y) : std::log1p(y) - mean_x;
    return kl > 0 ? kl : (kl == kl ? 0.0 : kl);
}

RowResult nan_result() {
    RowResult out;
    out.divergence = out.lse_a = out.shift = std::numeric_limits<double>::quiet_NaN();
    out.row_class = RowClass::nan;
    return out;
}

namespace {

// Errors of the sums as they reach log(1 + y), and the divergence.
struct SumErrors {
    double of_shift, of_divergence;

    SumErrors(const State& s, double mean_x, double mean_g, double y) {
        const double unit = kLn2 / s.z / (1 + y), through_z = (mean_g - y * mean_x) / kLn2 * s.fp32_sum_z;
        const double of_a1 = size_of_a1(s.fp32_sum_z, s.a1, s.fp32_sum);
        of_shift = unit * length(s.fp32_sum, of_a1);
        of_divergence = unit * length(s.fp32_sum, y * of_a1, through_z);
    }
};

}  // namespace

// The promise on values begins here.
constexpr double kLeastDivergence = 1e-12;

// In these columns a is nearly 0, or b is and a lies -d from it: but for a d less than c - 1, whose x
// outweighs what 2^-24 c may be off.
double rounded_mass(Reference r, double columns) {
    const double m = static_cast<double>(r.m), c = static_cast<double>(r.c);
    if (columns == 0) return 0;
    if (!(std::fabs(c) < 32)) return std::numeric_limits<double>::infinity();
    return 2 * columns * (std::exp2(-m) + std::exp2(-m - c));
}

RowResult finish(const State& s) {
    if ((s.flags & kSawNan) || !s.has_mass() || !(s.flags & kSawB)) {
        RowResult out = nan_result();
        // A sum that overflowed or underflowed must not pass for a NaN among the logits.
        out.trusted = (s.flags & kSawNan) != 0;
        return out;
    }
    const double mean_x = kLn2 * s.a1 / s.z, mean_g = kLn2 * s.a2 / s.z, y = mean_x + mean_g;
    const double z = s.z + s.lone_z, share = s.z / z, log_share = -std::log1p(s.lone_z / s.z),
                 above_c = (std::log1p(y) + log_share) / kLn2;
    RowResult out;
    out.lse_a = static_cast<double>(s.reference.m) + std::log2(z);
    out.shift = static_cast<double>(s.reference.c) + above_c;
    out.divergence = divergence_from(mean_x, mean_g);
    if (s.lone_z > 0 || s.lone_x > 0)  // a weight may be too small for fp32 where its product with x is not
        out.divergence = share * (out.divergence + log_share) + kLn2 * (s.lone_x + s.lone_z * above_c) / z;
    // The largest a formula of fp32 may not multiply by, whichever side it is on.
    out.top_r = s.flags & kSawFarB ? std::numeric_limits<double>::infinity() : s.top_d - out.shift;
    if (s.flags & kSawMasked) out.row_class = RowClass::masked;
    if (s.flags & (kSawNegInf | kSawOutOfRange)) out.row_class = RowClass::neg_inf;
    // Past 2^20 an fp32 holds too little of m and c to subtract them.
    out.trusted = !(s.flags & kSawHugeA) && std::isfinite(s.z) && std::isfinite(s.a1) &&
                  std::isfinite(s.a2) && std::isfinite(s.lone_x) && std::fabs(s.reference.m) < 0x1p20f &&
                  std::fabs(s.reference.c) < 0x1p20f;
    const SumErrors errors(s, mean_x, mean_g, y);
    out.trusted = out.trusted && errors.of_shift <= kWorstError && y > -1;
    if (s.flags & kSawInfinite) {
        // No divergence is left to measure the errors by, but tv and alpha feel all of the shift's.
        out.coarse_shift = errors.of_shift > kWorstError / 8;
        out.divergence = std::numeric_limits<double>::infinity();
        out.row_class = RowClass::infinite;
        return out;
    }
    const double of_divergence = length(share * errors.of_divergence, kLn2 * s.far_sum / z);
    if (!(of_divergence <= kWorstError * std::max(out.divergence, kLeastDivergence))) out.trusted = false;
    // d is off by up to 2^-24 |c|: nothing as long as the typical x is not far below c.
    const double c = static_cast<double>(s.reference.c) * kLn2;
    const double rounded = s.rounded_z / z;
    if (2 * out.divergence * 1024 < c * c * rounded) out.trusted = false;
    return out;
}

}  // namespace kl
