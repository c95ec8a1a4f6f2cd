// Sums and gradients over the columns of a row that are not picked.
#include "complement/gradient-inl.h"
#include "complement/sums-inl.h"
#include "isa/entries-inl.h"
#include "pair/copies-inl.h"

namespace kl::KL_ISA {
namespace {

ComplementSums sum(const ComplementRow& row, std::int64_t first, std::int64_t last, bool entropy) {
    return in_fp32_format(row.dtype, [&]<class T>() {
        return entropy ? sum_as<T, true>(row, first, last) : sum_as<T, false>(row, first, last);
    });
}

ComplementSums sum_known(const ComplementRow& row, float m, std::int64_t first, std::int64_t last) {
    return in_fp32_format(row.dtype, [&]<class T>() {
        return sum_known_run(static_cast<const T*>(row.x) + first, last - first,
                             static_cast<float>(row.exact_scale()), m);
    });
}

// Calls take(x, first, n) with copies in fp64 of scaled columns, -inf at the picked ones.
template <class Take>
void for_each_wide_copy(const ComplementRow& row, std::int64_t first, std::int64_t last, Take take) {
    double x[kScratchColumns];
    for (std::int64_t i = first; i < last; i += kScratchColumns) {
        const std::int64_t n = last - i < kScratchColumns ? last - i : kScratchColumns;
        widen_run(row.x, row.dtype, i, n, x);
        for (std::int64_t j = 0; j < n; ++j) x[j] *= row.exact_scale();
        for (std::int64_t j = 0; j < row.n_ids; ++j)
            if (row.ids[j] >= i && row.ids[j] < i + n) x[row.ids[j] - i] = minus_infinity<double>();
        take(x, i, n);
    }
}

ComplementSums sum_in_fp64(const ComplementRow& row) {
    Summation<double, VD, true> sums(1);
    Tile<double> tile;
    for_each_wide_copy(row, 0, row.columns, [&](const double* x, std::int64_t, std::int64_t n) {
        tile.start(x, n);
        sums.take(tile);
    });
    return sums.total;
}

void gradient_in_fp64(const ComplementRow& row, const ComplementScalars& s, Destination to,
                      std::int64_t first, std::int64_t last) {
    double out[kScratchColumns];
    for_each_wide_copy(row, first, last, [&](const double* x, std::int64_t i, std::int64_t n) {
        gradient_run(x, n, 1.0, s, out, false);
        round_run(out, n, to.data, to.dtype, i);
    });
}

void gradient(const ComplementRow& row, const ComplementScalars& s, Destination to, std::int64_t first,
              std::int64_t last, bool non_temporal) {
    // Flows that fp32 cannot hold, and an lse past what two of them hold for a subtraction.
    const auto odd = [](double flow) {
        return flow != 0 && !(std::fabs(flow) > 0x1p-60 && std::fabs(flow) < 0x1p60);
    };
    if (s.form == ComplementForm::fp64 || odd(s.grad_rest_lse) || odd(s.grad_rest_entropy) ||
        std::fabs(s.lse) > 0x1p20)
        return gradient_in_fp64(row, s, to, first, last);
    in_fp32_format(row.dtype, [&]<class T>() {
        gradient_run(static_cast<const T*>(row.x) + first, last - first, row.exact_scale(), s,
                     static_cast<T*>(to.data) + first, non_temporal);
    });
    if (non_temporal) non_temporal_fence();
}

void place(Destination to, const std::int64_t* ids, const double* values, std::int64_t n, double factor,
           std::int64_t first, std::int64_t last) {
    in_format(to.dtype, [&]<class T>() {
        for (std::int64_t i = 0; i < n; ++i)
            if (ids[i] >= first && ids[i] < last)
                round_one(values[i] * factor, static_cast<T*>(to.data)[ids[i]]);
    });
}

}  // namespace

const ComplementKernels complement_kernels{sum, sum_known, sum_in_fp64, gradient, fill, place};

}  // namespace kl::KL_ISA
