// What formulas other than KL share: columns from logits and a row's scalars, the sweep that sums their
// terms, and the gradient's side of it.
//
// Both sweeps come after the value sweep of KL(a||b), which has found lse(a), lse(b) - lse(a) and whether
// anything is missing. An error of those two reaches D only in proportion to D (in tv: to 1): terms are
// stationary where a = b.
#pragma once

#include "isa/entries-inl.h"
#include "pair/column_span-inl.h"
#include "pair/comparison-inl.h"
#include "pair/formulas-inl.h"
#include "pair/gradient_loop-inl.h"

namespace kl::KL_ISA {

// The powers of 2 that probabilities come times where sums of the smallest count, so that fp32 holds those.
template <class V>
KL_INLINE int gain_of(Formula f) {
    return std::is_same_v<V, VF> && (f == Formula::nla || f == Formula::comparison) ? 31 : 0;
}

template <class V>
struct FormulaRow {
    using S = typename Traits<V>::Scalar;

    RowConstants<V> row;
    V beta, w, mean_a, mean_b, coefficient_a, coefficient_b;

    FormulaRow(double exact_scale, const RowScalars& s)
        : row(exact_scale, s, true, gain_of<V>(s.formula), gain_of<V>(s.formula)),
          beta(constant<V>(s.beta)),
          w(constant<V>(1 - s.beta)),
          mean_a(constant<V>(s.mean_a)),
          mean_b(constant<V>(s.mean_b)),
          coefficient_a(constant<V>(std::ldexp(s.coefficient_a, -gain_of<V>(s.formula)))),
          coefficient_b(constant<V>(std::ldexp(s.coefficient_b, -gain_of<V>(s.formula)))) {}

    // Gives a column and its terms. NegInf: one of its logits may be -inf; both always may.
    template <class F, bool NegInf>
    KL_INLINE Terms<V> terms(V a, V b, Column<V>& c) const {
        const V zero{}, inf = splat<V>(static_cast<S>(__builtin_inf()));
        const Mask<V> no_a = a == -inf, no_b = b == -inf;
        if constexpr (NegInf) {
            a = no_a ? zero : a;
            b = no_b ? zero : b;
        }
        // So that an r past the format's range meets a probability of 0 as a number.
        const V limit = splat<V>(static_cast<S>(sizeof(S) == 4 ? 0x1p60 : 0x1p500));
        const V r = log_ratio(a, b, row);
        // Where both sides are -inf r is NaN, and max() makes a number of it, which meets two probabilities
        // of 0.
        c.r2 = min(limit, max(r, -limit));
        c.a = power(a, row, row.lse_a);
        c.b = power(b, row, row.lse_b);
        if constexpr (NegInf) {
            c.a = no_a ? zero : c.a;
            c.b = no_b ? zero : c.b;
            c.r2 = no_a ? (no_b ? zero : limit) : (no_b ? -limit : c.r2);
        }
        c.r = c.r2 * constant<V>(kLn2);
        c.beta = beta;
        c.w = w;
        Terms<V> t = F::at(c);
        if constexpr (NegInf && F::infinite_where_one_is_missing) {
            // The logits decide this: where a probability merely underflows to 0 the loss is finite.
            t.term = (no_a ^ no_b) ? inf : t.term;
            t.flow_a = (no_b & ~no_a) ? inf : t.flow_a;
            t.flow_b = (no_a & ~no_b) ? inf : t.flow_b;
        }
        return t;
    }
};

template <class F, bool NegInf, class V>
struct FormulaGradient {
    FormulaRow<V> row;

    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> at(V a, V b) const {
        Column<V> c;
        const Terms<V> t = row.template terms<F, NegInf>(a, b, c);
        return {(t.flow_a - c.a * row.mean_a) * row.coefficient_a,
                (t.flow_b - c.b * row.mean_b) * row.coefficient_b};
    }
};

template <class F, bool NegInf, class V>
constexpr bool asks_at_each_store<FormulaGradient<F, NegInf, V>> = true;

// fp64 has no loop for finite rows alone: its rows are few, or slow for other reasons.
template <class T>
inline bool may_have_neg_inf(const RowScalars& s) {
    return std::is_same_v<T, double> ||
           (s.row_class != RowClass::all_finite && s.row_class != RowClass::masked);
}

template <class T>
void formula_gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars,
                          T* to_a, T* to_b, bool non_temporal) {
    using V = Wide<T>;
    const FormulaRow<V> row(scale, scalars);
    with_formula(scalars.formula, [&]<class F>() {
        if constexpr (!std::is_same_v<T, double>) {
            if (!may_have_neg_inf<T>(scalars))
                return gradient_to(a, b, n, FormulaGradient<F, false, V>{row}, to_a, to_b, non_temporal);
        }
        gradient_to(a, b, n, FormulaGradient<F, true, V>{row}, to_a, to_b, non_temporal);
    });
}

// Steps between two foldings into fp64: 32 additions to an fp32 accumulator leave rounding well under the
// promise even where every column adds the same number.
constexpr std::int64_t kStepsPerSum = 32;

// `n` is a multiple of kStep<T>.
template <class F, bool NegInf, class T>
inline FormulaSums sum_steps(const T* a, const T* b, std::int64_t n, const FormulaRow<Wide<T>>& of) {
    using V = Wide<T>;
    const FormulaRow<V> row = of;
    FormulaSums total;
    for (std::int64_t i = 0; i < n;) {
        const std::int64_t stop = n - i < kStepsPerSum * kStep<T> ? n : i + kStepsPerSum * kStep<T>;
        V term{}, flow_a{}, flow_b{};
        const auto add = [&](V x, V y) KL_INLINE_LAMBDA {
            Column<V> c;
            const Terms<V> t = row.template terms<F, NegInf>(x, y, c);
            term += t.term;
            flow_a += t.flow_a;
            flow_b += t.flow_b;
        };
        for (; i < stop; i += kStep<T>) {
            const auto va = load_pair(a + i), vb = load_pair(b + i);
            add(va.x, vb.x);
            add(va.y, vb.y);
        }
        total += {sum(term), sum(flow_a), sum(flow_b)};
    }
    return total;
}

template <class T>
FormulaSums formula_sums_run(const T* a, const T* b, std::int64_t n, double scale,
                             const RowScalars& scalars) {
    const FormulaRow<Wide<T>> row(scale, scalars);
    const auto sums = [&]<class F>() {
        // What does not fill a step lies in a copy, filled up with columns that do not exist.
        const ColumnSpan<T> in(a, b, n);
        FormulaSums total;
        if constexpr (std::is_same_v<T, double>)
            total = sum_steps<F, true>(in.a, in.b, in.columns, row);
        else
            total = may_have_neg_inf<T>(scalars) ? sum_steps<F, true>(in.a, in.b, in.columns, row)
                                                 : sum_steps<F, false>(in.a, in.b, in.columns, row);
        if (in.rest > 0) total += sum_steps<F, true>(in.last_a, in.last_b, kStep<T>, row);
        return total.scaled(-gain_of<Wide<T>>(scalars.formula));
    };
    if (scalars.formula == Formula::comparison) {
        if constexpr (!std::is_same_v<T, double>)
            if (!may_have_neg_inf<T>(scalars) && may_compare_fast(scalars))
                return compare(ColumnSpan<T>(a, b, n), scale, scalars);
        return sums.template operator()<formulas::comparison>();
    }
    return with_formula(scalars.formula,
                        [&]<class F>() { return sums.template operator()<typename F::Sums>(); });
}

}  // namespace kl::KL_ISA
