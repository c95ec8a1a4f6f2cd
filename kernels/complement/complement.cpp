// What complement() and its gradient do with the rows of a call; runtime/blocks.h shares them out.
#include "complement/complement.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/blocks.h"
#include "runtime/dispatch.h"
#include "runtime/memory.h"

namespace kl {

void ComplementSums::operator+=(const ComplementSums& other) {
    bad = bad || other.bad;
    if (!(other.m > -__builtin_inf())) return;
    ComplementSums low = other;
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

struct Layout : RowBlocks<ComplementArgs> {
    const ComplementKernels& kernels_of_set() const { return *k.complement; }
    ComplementRow row(std::int64_t r) const {
        return {row_of(p.x, r), p.x.dtype, p.scale(r), p.columns, p.ids + r * p.n_ids, p.n_ids, scratch()};
    }
    // The thread's own: an allocation a row would cost as much as a small row.
    std::int64_t* scratch() const {
        static thread_local std::vector<std::int64_t> numbers;
        numbers.resize(static_cast<std::size_t>(p.n_ids));
        return numbers.data();
    }
    bool fits_fp32(std::int64_t r) const { return kl::fits_fp32(row(r)); }
};

}  // namespace

bool fits_fp32(const ComplementRow& row) {
    const double scale = row.exact_scale();
    return row.dtype != Dtype::f64 && scale > 0x1p-60 && scale < 0x1p60;
}

ComplementResult finish(const ComplementKernels& kernels, const ComplementRow& row, ComplementSums sums,
                        bool entropy) {
    ComplementForm form = ComplementForm::fp32;
    // fp64 decides what is a NaN, and takes rows so large that the rounding of m shows in the result.
    const bool has_mass = sums.m > -__builtin_inf();
    if (!fits_fp32(row) || sums.bad || (has_mass && !(std::fabs(sums.m) < 0x1p20))) {
        form = ComplementForm::fp64;
        sums = kernels.sum_in_fp64(row);
    }
    double lse = sums.z == 0 ? -__builtin_inf() : sums.m + std::log2(sums.z), exact = lse;
    if (form == ComplementForm::fp32 && sums.z > 0) {
        // The sums were taken with the scale rounded to fp32. That shows where all logits are large.
        const double scale = row.exact_scale(), rounded = static_cast<double>(static_cast<float>(scale));
        exact += (scale / rounded - 1) * (sums.m + (entropy ? sums.t / sums.z : 0));
    }
    sums.bad = sums.bad || std::isnan(row.exact_scale());
    if (sums.bad) lse = exact = std::nan("");
    // sum pi (log2 z - y): neither part is negative.
    const double nats = (std::log2(sums.z) - sums.t / sums.z) * kLn2;
    const double of_row = !entropy || sums.z == 0 ? 0 : std::max(0.0, nats);
    return {lse, form, exact * kLn2, sums.bad ? std::nan("") : of_row};
}

void complement(const ComplementArgs& p, bool entropy, double* rest_lse, double* rest_entropy,
                double* stats) {
    const Layout layout{p, kernels()};
    const bool fp32 = layout.rows() > 0 && layout.fits_fp32(0);
    const auto block = [&](std::int64_t r, std::int64_t n) {
        return layout.kernels_of_set().sum(layout.row(r), layout.first(n), layout.last(n), entropy);
    };
    fold_blocks(layout, layout.splits_rows() && fp32, block, [&](std::int64_t r, auto sums_of) {
        double* const row_stats = stats + r * kComplementStats;
        if (!layout.is_valid(r)) {
            rest_lse[r] = rest_entropy[r] = 0;
            std::fill_n(row_stats, static_cast<int>(kComplementStats), 0.0);
            return;
        }
        ComplementSums total;
        for (std::int64_t n = 0; layout.fits_fp32(r) && n < layout.blocks(); ++n) total += sums_of(n);
        const ComplementResult found = finish(layout.kernels_of_set(), layout.row(r), total, entropy);
        rest_lse[r] = found.rest_lse;
        rest_entropy[r] = found.entropy;
        row_stats[kRestLse] = found.lse;
        row_stats[kRestForm] = static_cast<double>(static_cast<int>(found.form));
        row_stats[kRestEntropy] = found.entropy;
    });
}

void complement_gradient(const ComplementArgs& p, const double* stats, const double* grad_picked,
                         const double* grad_rest_lse, const double* grad_rest_entropy, const Gradient& to) {
    const Layout layout{p, kernels()};
    const ComplementKernels& of_set = layout.kernels_of_set();
    const bool non_temporal = uses_non_temporal_stores(to, p.x, p.size_a, p.size_b, p.columns);
    const auto block = [&](std::int64_t r, std::int64_t n) {
        const Destination out = layout.row_of(to, r);
        const std::int64_t first = layout.first(n), last = layout.last(n);
        if (!layout.is_valid(r)) return of_set.fill(out, first, last, 0);
        const double* const s = stats + r * kComplementStats;
        const ComplementScalars scalars{s[kRestLse],
                                        static_cast<ComplementForm>(static_cast<int>(s[kRestForm])),
                                        s[kRestEntropy], grad_rest_lse[r] * p.scale(r),
                                        grad_rest_entropy == nullptr ? 0 : grad_rest_entropy[r] * p.scale(r)};
        const bool is_zero =
            (scalars.grad_rest_lse == 0 && scalars.grad_rest_entropy == 0) || scalars.lse == -__builtin_inf();
        const bool is_nan = !std::isfinite(scalars.grad_rest_lse) ||
                            !std::isfinite(scalars.grad_rest_entropy) || std::isnan(scalars.lse) ||
                            std::isnan(scalars.entropy);
        const ComplementRow row = layout.row(r);
        if (is_zero || is_nan)
            of_set.fill(out, first, last, is_zero ? 0 : std::nan(""));
        else
            of_set.gradient(row, scalars, out, first, last, non_temporal);
        of_set.place(out, row.ids, grad_picked + r * p.n_ids, p.n_ids, p.scale(r), first, last);
    };
    if (layout.splits_rows()) return for_each_block(layout, block);
    for_each_row(layout, [&](std::int64_t r) {
        for (std::int64_t n = 0; n < layout.blocks(); ++n) block(r, n);
    });
}

}  // namespace kl
