#include "shards/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "runtime/blocks.h"

namespace kl {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// From here on the kernels recompute a row in fp64 whatever its stats say.
constexpr double kOutOfRange = 0x1p20 * kLn2;

// One number of all shards, of one row.
struct Line {
    const double* first;
    std::int64_t shards, stride;

    double operator[](std::int64_t shard) const { return first[shard * stride]; }
};

// log sum e^x; NaN where nothing has mass.
template <class X>
double log_sum(std::int64_t shards, X x) {
    double top = -kInf, total = 0;
    for (std::int64_t k = 0; k < shards; ++k) top = x(k) > top || x(k) != x(k) ? x(k) : top;
    if (!std::isfinite(top)) return kNan;
    for (std::int64_t k = 0; k < shards; ++k) total += std::exp(x(k) - top);
    return top + std::log(total);
}

// The mass of each side on a shard, and r = log b/a; -inf and +inf where one side has none, 0 where neither.
struct Share {
    double a, b, r;
};

// What a shard adds to KL(a||b): its part of what lies between the shards, and of what lies inside it.
double chain_term(const Share& s, double inside) {
    // A token that a allows and b excludes makes it infinite, however little a gives to that shard.
    if (s.r == -kInf || (s.r != kInf && inside == kInf)) return kInf;
    if (s.r == kInf) return s.b;
    const double between = std::fabs(s.r) < 1 ? s.a * g(s.r) : s.b - s.a - s.a * s.r;
    return between + (s.a == 0 ? 0 : s.a * inside);
}

// One row on all shards, merged into `shares` and the whole row's normalisers.
struct Merged {
    double log_a, ratio;

    Merged(const Line& log_of_a, const Line& second, std::vector<Share>& shares) {
        const std::int64_t shards = log_of_a.shards;
        const auto no_a = [&](std::int64_t k) { return log_of_a[k] == -kInf; };
        const auto log_of_b = [&](std::int64_t k) { return no_a(k) ? second[k] : log_of_a[k] + second[k]; };
        const auto both = [&](std::int64_t k) { return !no_a(k) && log_of_b(k) != -kInf; };
        log_a = log_sum(shards, [&](std::int64_t k) { return log_of_a[k]; });
        const double log_b = log_sum(shards, log_of_b);
        // About the mean of the shards' ratios, so that ratios of 1 + 1e-6 keep their digits beside
        // normalisers of a thousand.
        double c = 0, y = 0;
        for (std::int64_t k = 0; k < shards; ++k) {
            const double a = no_a(k) ? 0 : std::exp(log_of_a[k] - log_a);
            if (both(k)) c += a * second[k];
            shares[at(k)].a = a;
        }
        for (std::int64_t k = 0; k < shards; ++k) {
            const double a = shares[at(k)].a, x = second[k] - c;
            y += both(k) && std::fabs(x) < 1 ? a * std::expm1(x) : std::exp(log_of_b(k) - log_a - c) - a;
        }
        ratio = std::fabs(y) < 0.5 ? c + std::log1p(y) : log_b - log_a;
        // log1p makes a number of a side without mass.
        if (!std::isfinite(log_a) || !std::isfinite(log_b)) ratio = kNan;
        for (std::int64_t k = 0; k < shards; ++k) {
            const bool no_b = log_of_b(k) == -kInf;
            shares[at(k)].b = no_b ? 0 : std::exp(log_of_b(k) - (log_a + ratio));
            shares[at(k)].r = both(k) ? second[k] - ratio : no_b == no_a(k) ? 0 : no_b ? -kInf : kInf;
        }
    }

    static std::size_t at(std::int64_t k) { return static_cast<std::size_t>(k); }

    // Whether stats can say where the normalisers lie; a NaN row is no question of that.
    bool fits() const {
        return !(std::fabs(log_a) >= kOutOfRange || std::fabs(log_a + ratio) >= kOutOfRange);
    }

    double divergence(const std::vector<Share>& shares, const Line& inside, bool other_way) const {
        // Also where its terms are infinite: a row in which a side has no distribution has no divergence.
        if (std::isnan(log_a) || std::isnan(ratio)) return kNan;
        double total = 0;
        for (std::int64_t k = 0; k < inside.shards; ++k) {
            const Share& s = shares[at(k)];
            total += chain_term(other_way ? Share{s.b, s.a, -s.r} : s, inside[k]);
        }
        return total < 0 ? 0 : total;
    }
};

template <class R>
bool pack(const R* stats, const Units& units, std::int64_t rows, const void* const* inside, int n,
          double* out) {
    const auto whole = [](const R* parts) {
        return static_cast<double>(parts[0]) + static_cast<double>(parts[1]);
    };
    bool finite = true;
    for (std::int64_t i = 0; i < rows; ++i) {
        const R* const row = stats + i * kStats;
        const double log_a = whole(row + kLseHi) * units[i], ratio = whole(row + kShiftHi) * units[i];
        out[i] = log_a;
        out[rows + i] = ratio;
        finite = finite && std::isfinite(log_a + ratio);
    }
    for (int k = 0; k < n; ++k) {
        const R* const value = static_cast<const R*>(inside[k]);
        std::transform(value, value + rows, out + (2 + k) * rows, [](R x) { return static_cast<double>(x); });
    }
    return finite;
}

template <class R>
void unpack(const R* local, double unit, Formula formula, double log_a, double ratio, const double* numbers,
            R* out) {
    const auto split = [](double x, R* parts) {
        parts[0] = static_cast<R>(x);
        parts[1] = static_cast<R>(x - static_cast<double>(parts[0]));
    };
    const auto own = static_cast<RowClass>(static_cast<int>(local[kRowClass]));
    RowClass row_class = own == RowClass::all_finite ? RowClass::all_finite : RowClass::neg_inf;
    if (formula == Formula::kl && numbers[0] == kInf) row_class = RowClass::infinite;
    if (std::isnan(numbers[0] + ratio)) row_class = RowClass::nan;
    const double shift = ratio / unit;
    // No ratio is known of a part that has mass on one side only.
    double top = static_cast<double>(local[kTopR]) + static_cast<double>(local[kShiftHi]) +
                 static_cast<double>(local[kShiftLo]) - shift;
    if (own == RowClass::nan || std::isnan(top)) top = kInf;
    std::fill_n(out, static_cast<int>(kStats), R{0});
    split(log_a / unit, out + kLseHi);
    split(shift, out + kShiftHi);
    out[kDivergence] = formula == Formula::kl ? static_cast<R>(numbers[0]) : R{0};
    out[kRowClass] = static_cast<R>(static_cast<int>(row_class));
    out[kTopR] = static_cast<R>(top);
    out[kValue] = static_cast<R>(numbers[0]);
    out[kMeanA] = static_cast<R>(numbers[1]);
    out[kMeanB] = static_cast<R>(numbers[2]);
    out[kRowBeta] = static_cast<R>(numbers[3]);
}

}  // namespace

bool shard_states(const void* stats, bool wide, const Units& units, std::int64_t rows,
                  const void* const* inside, int n, double* out) {
    return wide ? pack(static_cast<const double*>(stats), units, rows, inside, n, out)
                : pack(static_cast<const float*>(stats), units, rows, inside, n, out);
}

bool merge_shards(const double* found, std::int64_t shards, std::int64_t rows, int n, double* out) {
    std::vector<Share> shares(static_cast<std::size_t>(shards));
    bool all_fit = true;
    for (std::int64_t i = 0; i < rows; ++i) {
        const auto line = [&](int number) { return Line{found + number * rows + i, shards, (2 + n) * rows}; };
        const Merged row(line(0), line(1), shares);
        out[i] = row.log_a;
        out[rows + i] = row.ratio;
        all_fit = all_fit && row.fits();
        for (int way = 0; way < n; ++way)
            out[(2 + way) * rows + i] = row.divergence(shares, line(2 + way), way == 1);
    }
    return all_fit;
}

void whole_row_stats(const void* local, bool wide, const Units& units, std::int64_t rows, Formula formula,
                     const double* log_a, const double* ratio, const double* numbers, void* out) {
    in_compute_type(wide, [&]<class R>() {
        const R* const from = static_cast<const R*>(local);
        R* const to = static_cast<R*>(out);
        for (std::int64_t i = 0; i < rows; ++i)
            unpack(from + i * kStats, units[i], formula, log_a[i], ratio[i], numbers + 4 * i,
                   to + i * kStats);
    });
}

}  // namespace kl
