// Rows over threads, and blocks of a row where there are fewer rows than threads; a row's sums are folded
// from the same blocks in the same order either way.
#include "remainder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "pages.h"
#include "pool.h"

namespace kl {

void RemainderSums::operator+=(const RemainderSums& other) {
    bad = bad || other.bad;
    if (!(other.m > -__builtin_inf())) return;
    RemainderSums low = other;
    if (low.m > m) {
        std::swap(low.m, m);
        std::swap(low.z, z);
        std::swap(low.t, t);
    }
    if (!(low.m > -__builtin_inf())) return;
    const double h = low.m - m, w = std::exp2(h);
    z += w * low.z;
    t += w * (low.t + h * low.z);
}

namespace {

constexpr std::int64_t kGrain = 32768;  // columns worth handing to another thread
constexpr double kLn2 = 0.69314718055994530942;

struct Layout {
    const RemainderProblem& p;
    const Kernels& k;

    const RemainderKernels& of() const { return *k.remainder; }
    std::int64_t rows() const { return p.size_a * p.size_b; }
    std::int64_t blocks() const { return (p.columns + k.block - 1) / k.block; }
    std::int64_t end(std::int64_t block) const { return std::min(p.columns, (block + 1) * k.block); }
    bool counts(std::int64_t r) const {
        return p.rows.data == nullptr ||
               p.rows.data[r / p.size_b * p.rows.stride_a + r % p.size_b * p.rows.stride_b] != 0;
    }
    template <class Side>
    std::int64_t offset(const Side& side, std::int64_t r) const {
        return (r / p.size_b * side.stride_a + r % p.size_b * side.stride_b) * size_of(side.dtype);
    }
    RemainderRow row(std::int64_t r) const {
        return {static_cast<const char*>(p.x.data) + offset(p.x, r),
                p.x.dtype,
                p.x.scale,
                p.columns,
                p.ids + r * p.n_ids,
                p.n_ids};
    }
    bool splits_rows() const {
        return p.threads > 1 && blocks() > 1 && rows() < 2 * static_cast<std::int64_t>(p.threads);
    }
    // Whether 2^exponents of this problem fit fp32 at all; single rows may turn out not to.
    bool fits_fp32() const {
        const double scale = row_scale();
        return p.x.dtype != Dtype::f64 && scale > 0x1p-60 && scale < 0x1p60;
    }
    double row_scale() const { return p.x.scale * Row::kLog2e; }
};

template <class F>
void over_threads(std::int64_t items, int threads, F f) {
    run_items(items, threads, [](void* c, std::int64_t i) { (*static_cast<F*>(c))(i); }, &f);
}

// Calls f(row, first block, blocks past the last): whole rows, or a block at a time.
template <class F>
void for_each_piece(const Layout& layout, F f) {
    const std::int64_t rows = layout.rows(), blocks = layout.blocks();
    if (layout.splits_rows())
        return over_threads(rows * blocks, layout.p.threads,
                            [&](std::int64_t i) { f(i / blocks, i % blocks, i % blocks + 1); });
    const std::int64_t step = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(layout.p.columns, 1));
    over_threads((rows + step - 1) / step, layout.p.threads, [&](std::int64_t i) {
        for (std::int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) f(r, 0, blocks);
    });
}

void settle(const Layout& layout, std::int64_t r, RemainderSums sums, bool entropy, double* u, double* spread,
            double* stats) {
    RemainderForm form = RemainderForm::fp32;
    // fp64 has the last word on what is a NaN, and where the rounding of m itself is an exponent that shows.
    const bool has_mass = sums.m > -__builtin_inf();
    if (!layout.fits_fp32() || sums.bad || (has_mass && !(std::fabs(sums.m) < 0x1p20))) {
        form = RemainderForm::fp64;
        sums = layout.of().sum_in_fp64(layout.row(r));
    }
    double lse = sums.z == 0 ? -__builtin_inf() : sums.m + std::log2(sums.z), exact = lse;
    if (form == RemainderForm::fp32 && sums.z > 0) {
        // The sums were taken with the scale rounded to fp32. That shows where all logits are large.
        const double scale = layout.row_scale(), rounded = static_cast<double>(static_cast<float>(scale));
        exact += (scale / rounded - 1) * (sums.m + (entropy ? sums.t / sums.z : 0));
    }
    if (sums.bad) lse = exact = std::nan("");
    // sum pi (log2 z - y): neither part is negative.
    *spread = !entropy || sums.z == 0 ? 0 : std::max(0.0, (std::log2(sums.z) - sums.t / sums.z) * kLn2);
    if (sums.bad) *spread = std::nan("");
    *u = exact * kLn2;
    stats[kRestLse] = lse;
    stats[kRestForm] = static_cast<double>(static_cast<int>(form));
    stats[kRestEntropy] = *spread;
}

}  // namespace

void remainder(const RemainderProblem& p, bool entropy, double* u, double* spread, double* stats) {
    const Layout layout{p, kernels()};
    const bool fp32 = layout.fits_fp32();
    const auto block = [&](std::int64_t r, std::int64_t n) {
        return layout.of().sum(layout.row(r), n * layout.k.block, layout.end(n), entropy);
    };
    const auto settle_row = [&](std::int64_t r, const RemainderSums& sums) {
        settle(layout, r, sums, entropy, u + r, spread + r, stats + r * kRemainderStats);
    };
    const auto skip = [&](std::int64_t r) {
        u[r] = spread[r] = 0;
        std::fill_n(stats + r * kRemainderStats, static_cast<int>(kRemainderStats), 0.0);
    };
    if (layout.splits_rows() && fp32) {
        std::vector<RemainderSums> sums(static_cast<std::size_t>(layout.rows() * layout.blocks()));
        for_each_piece(layout, [&](std::int64_t r, std::int64_t n, std::int64_t) {
            if (layout.counts(r)) sums[static_cast<std::size_t>(r * layout.blocks() + n)] = block(r, n);
        });
        for (std::int64_t r = 0; r < layout.rows(); ++r) {
            if (!layout.counts(r)) {
                skip(r);
                continue;
            }
            RemainderSums total;
            for (std::int64_t n = 0; n < layout.blocks(); ++n)
                total += sums[static_cast<std::size_t>(r * layout.blocks() + n)];
            settle_row(r, total);
        }
        return;
    }
    const std::int64_t step = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(p.columns, 1));
    over_threads((layout.rows() + step - 1) / step, p.threads, [&](std::int64_t i) {
        for (std::int64_t r = i * step; r < std::min(layout.rows(), (i + 1) * step); ++r) {
            if (!layout.counts(r)) {
                skip(r);
                continue;
            }
            RemainderSums total;
            for (std::int64_t n = 0; fp32 && n < layout.blocks(); ++n) total += block(r, n);
            settle_row(r, total);
        }
    });
}

void remainder_gradient(const RemainderProblem& p, const double* stats, const double* to_given,
                        const double* to_rest, const double* to_entropy, const Gradient& to) {
    const Layout layout{p, kernels()};
    const bool stream = stores_past_cache(to, p.x, p.size_a, p.size_b, p.columns);
    for_each_piece(layout, [&](std::int64_t r, std::int64_t first_block, std::int64_t last_block) {
        const RemainderRow row = layout.row(r);
        const Destination out{static_cast<char*>(to.data) + layout.offset(to, r), to.dtype};
        const double* const s = stats + r * kRemainderStats;
        RemainderScalars scalars{s[kRestLse], static_cast<RemainderForm>(static_cast<int>(s[kRestForm])),
                                 s[kRestEntropy], to_rest[r] * p.x.scale,
                                 to_entropy == nullptr ? 0 : to_entropy[r] * p.x.scale};
        for (std::int64_t n = first_block; n < last_block; ++n) {
            const std::int64_t first = n * layout.k.block, last = layout.end(n);
            const bool still = (scalars.to_rest == 0 && scalars.to_entropy == 0) ||
                               scalars.lse == -__builtin_inf() || !layout.counts(r);
            const bool broken = !std::isfinite(scalars.to_rest) || !std::isfinite(scalars.to_entropy) ||
                                std::isnan(scalars.lse) || std::isnan(scalars.entropy);
            if (still)
                layout.of().fill(out, first, last, 0);
            else if (broken)
                layout.of().fill(out, first, last, std::nan(""));
            else
                layout.of().gradient(row, scalars, out, first, last, stream);
            if (layout.counts(r))
                layout.of().place(out, row.ids, to_given + r * p.n_ids, p.n_ids, p.x.scale, first, last);
        }
    });
}

}  // namespace kl
