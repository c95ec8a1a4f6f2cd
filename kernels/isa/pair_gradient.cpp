// Which arithmetic a row's formula pass and its gradient take.
#include <cmath>

#include "isa/entries-inl.h"
#include "pair/column_span-inl.h"
#include "pair/copies-inl.h"
#include "pair/difference-inl.h"
#include "pair/label-inl.h"

namespace kl::KL_ISA {
namespace {

// Whether the scalars say too little of the row for its gradient: past 2^20 two fp32 do not hold an
// lse to the precision that its subtraction needs, nor one a divergence that the gradient of a subtracts.
bool is_out_of_range(const RowScalars& s, bool uses_divergence) {
    constexpr double limit = 0x1p20;
    return !(std::fabs(s.lse_a) < limit) || !(std::fabs(s.lse_b) < limit) ||
           (uses_divergence && s.divergence > limit && s.divergence < __builtin_inf());
}

// Whether a formula's sweeps need fp64 although the formats do not ask for it.
bool need_fp64(const RowScalars& s, bool of_gradient) {
    if (s.formula == Formula::kl) return false;
    // lk's sums are tv's. A beta this close to an end has terms of second order that underflow.
    const bool is_mixture = s.formula == Formula::js || s.formula == Formula::skew,
               uses_r = s.formula == Formula::jeffreys || (s.formula == Formula::lk && of_gradient);
    return (uses_r && !(s.top_r < kMostR)) ||
           ((is_mixture || s.formula == Formula::jeffreys) && !(s.beta > 0x1p-20 && s.beta < 1 - 0x1p-20));
}

// The scalars of an out-of-range row as fp64 computes them: the stats, in fp32, could not hold them.
RowScalars evaluated_again(const Row& row, RowScalars s) {
    const RowResult again = fallback(row);
    s.lse_a = again.lse_a;
    s.lse_b = again.lse_b;
    s.shift = again.shift;
    s.divergence = again.divergence;
    return s;
}

}  // namespace

bool has_far_column(const Row& row, double shift) {
    const VF minus_inf = splat<VF>(-__builtin_inff()), k = splat<VF>(row.scale()),
             c = splat<VF>(static_cast<float>(shift)), most = splat<VF>(static_cast<float>(kMostR / 2));
    VI far{};
    for_each_tile(row, 0, row.columns, [&](const auto& tile, std::int64_t) {
        const auto column = [&](VF a, VF b) KL_INLINE_LAMBDA {
            far |= (a > minus_inf) & (b > minus_inf) & ~(abs(fma(b - a, k, -c)) < most);
        };
        tile.for_each_step([&](const auto* at_a, const auto* at_b) KL_INLINE_LAMBDA {
            const auto a = load_pair(at_a), b = load_pair(at_b);
            column(a.x, b.x);
            column(a.y, b.y);
        });
    });
    return any<VF>(far);
}

FormulaSums formula_sums(const Row& row, const RowScalars& scalars, std::int64_t first, std::int64_t last) {
    const double nan = std::nan("");
    if (scalars.row_class == RowClass::zero) return {};
    if (scalars.row_class == RowClass::nan) return {nan, nan, nan};
    FormulaSums total;
    const auto copies = [&]<class R>(const RowScalars& s) {
        for_each_copy<R>(row, first, last,
                         [&](const R* a, const R* b, std::int64_t, std::int64_t n, double scale) {
                             total += formula_sums_run(a, b, n, scale, s);
                         });
        return total;
    };
    const bool again = is_out_of_range(scalars, false);
    if (again || !row.fits_fp32() || need_fp64(scalars, false))
        return copies.template operator()<double>(again ? evaluated_again(row, scalars) : scalars);
    if (row.dtype_a != row.dtype_b) return copies.template operator()<float>(scalars);
    return in_fp32_format(row.dtype_a, [&]<class T>() {
        return formula_sums_run(at<T>(row.a, first), at<T>(row.b, first), last - first, row.exact_scale(),
                                scalars);
    });
}

namespace {

template <class T>
void gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars, T* to_a,
                  T* to_b, bool non_temporal) {
    if (scalars.formula == Formula::kl)
        kl_gradient_run(a, b, n, scale, scalars, to_a, to_b, non_temporal);
    else
        formula_gradient_run(a, b, n, scale, scalars, to_a, to_b, non_temporal);
}

template <class R>
void gradient_through_copies(const Row& row, const RowScalars& scalars, Destination to_a, Destination to_b,
                             std::int64_t first, std::int64_t last, const LabelTerm& label) {
    R out_a[kScratchColumns] = {}, out_b[kScratchColumns] = {};
    // Copies in fp64 are scaled already.
    const double own = label.of_a ? row.scale_a() : row.scale_b();
    const LabelColumns<Wide<R>> columns(std::is_same_v<R, double> ? label.scale / own : label.scale, label);
    for_each_copy<R>(row, first, last,
                     [&](const R* a, const R* b, std::int64_t i, std::int64_t n, double scale) {
                         gradient_run(a, b, n, scale, scalars, to_a.data ? out_a : nullptr,
                                      to_b.data ? out_b : nullptr, false);
                         if (label.factor != 0)
                             columns.add(label.of_a ? a : b, n, label.of_a ? out_a : out_b, label, i);
                         if (to_a.data) round_run(out_a, n, to_a.data, to_a.dtype, i);
                         if (to_b.data) round_run(out_b, n, to_b.data, to_b.dtype, i);
                     });
}

const void* column_of(const void* row, Dtype dtype, std::int64_t column) {
    return static_cast<const char*>(row) + column * size_of(dtype);
}

template <class T>
T* from(Destination to, std::int64_t column) {
    return to.data == nullptr ? nullptr : static_cast<T*>(to.data) + column;
}

// In fp32. The label's own column is taken apart, before its logits may be written over.
void gradient_with_label(const Row& row, const RowScalars& scalars, Destination to_a, Destination to_b,
                         std::int64_t first, std::int64_t last, bool non_temporal, const LabelTerm& label) {
    const bool here = label.column >= first && label.column < last;
    const Destination& to = label.of_a ? to_a : to_b;
    float at_label = 0;
    if (here) {
        const Destination own{&at_label, Dtype::f32};
        const auto only = [&](bool of_a) {
            return of_a == label.of_a ? own : Destination{nullptr, Dtype::f32};
        };
        Row one = row;
        one.a = column_of(row.a, row.dtype_a, label.column);
        one.b = column_of(row.b, row.dtype_b, label.column);
        LabelTerm of_one = label;
        of_one.column = 0;
        gradient_through_copies<float>(one, scalars, only(true), only(false), 0, 1, of_one);
    }
    bool done = false;
    if (scalars.formula == Formula::kl && row.dtype_a == row.dtype_b)
        in_fp32_format(row.dtype_a, [&]<class T>() {
            done = kl_gradient_with_label(at<T>(row.a, first), at<T>(row.b, first), last - first,
                                          row.exact_scale(), scalars, label, from<T>(to_a, first),
                                          from<T>(to_b, first), non_temporal);
        });
    if (!done) return gradient_through_copies<float>(row, scalars, to_a, to_b, first, last, label);
    if (non_temporal) non_temporal_fence();
    if (here)
        in_format(to.dtype, [&]<class T>() { round_one(at_label, static_cast<T*>(to.data)[label.column]); });
}

}  // namespace

void gradient(const Row& row, const RowScalars& scalars, Destination to_a, Destination to_b,
              std::int64_t first, std::int64_t last, bool non_temporal, const LabelTerm& label) {
    // Sides whose gradient is one number in all columns are done before the sweep.
    const auto finish_side = [&](Destination& to, double coefficient, bool is_nan, bool with_label) {
        is_nan = is_nan || scalars.row_class == RowClass::nan || std::isnan(coefficient) ||
                 (with_label && !std::isfinite(label.lse));
        const bool is_zero = scalars.row_class == RowClass::zero;
        // A factor of 0 gives 0, and never -0: p and q are finite where the gradient is not NaN.
        if (!is_zero && !is_nan && (coefficient != 0 || with_label)) return;
        fill(to, first, last, is_nan && !is_zero ? std::nan("") : 0);
        to.data = nullptr;
    };
    const bool is_kl = scalars.formula == Formula::kl;
    const bool labelled = label.factor != 0 && (label.of_a ? to_a : to_b).data != nullptr;
    finish_side(to_a, scalars.coefficient_a,
                is_kl ? scalars.row_class == RowClass::infinite : !std::isfinite(scalars.mean_a),
                labelled && label.of_a);
    finish_side(to_b, scalars.coefficient_b, !is_kl && !std::isfinite(scalars.mean_b),
                labelled && !label.of_a);
    if (to_a.data == nullptr && to_b.data == nullptr) return;

    const bool uses_divergence = is_kl && to_a.data != nullptr && !(row.fits_fp32() && may_take_far(scalars));
    const bool again = is_out_of_range(scalars, uses_divergence);
    const bool adds_label = labelled && (label.of_a ? to_a : to_b).data != nullptr;
    const LabelTerm none, &term = adds_label ? label : none;
    if (again || !row.fits_fp32() || need_fp64(scalars, true) || (adds_label && !fits_fp32(label)))
        return gradient_through_copies<double>(row, again ? evaluated_again(row, scalars) : scalars, to_a,
                                               to_b, first, last, term);
    if (adds_label) return gradient_with_label(row, scalars, to_a, to_b, first, last, non_temporal, label);
    if (row.dtype_a != row.dtype_b)
        return gradient_through_copies<float>(row, scalars, to_a, to_b, first, last, none);
    in_fp32_format(row.dtype_a, [&]<class T>() {
        gradient_run<T>(at<T>(row.a, first), at<T>(row.b, first), last - first, row.exact_scale(), scalars,
                        from<T>(to_a, first), from<T>(to_b, first), non_temporal);
    });
    if (non_temporal) non_temporal_fence();
}

}  // namespace kl::KL_ISA
