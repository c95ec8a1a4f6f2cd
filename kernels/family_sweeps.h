// What families other than KL share: columns from logits and a row's scalars, the sweep that sums their
// terms, and the gradient's side of it.
//
// Both sweeps come after the value sweep of KL(a||b), which has found lse(a), lse(b) - lse(a) and whether
// anything is missing. An error of those two reaches D only in proportion to D (in tv: to 1): terms are
// stationary where a = b.
#pragma once

#include "families.h"
#include "gradient.h"
#include "sweep.h"

namespace kl::KL_ISA {

template <class V>
struct FamilyRow {
    using S = typename Traits<V>::Scalar;

    RowConstants<V> row;
    V beta, w, mean_a, mean_b, coefficient_a, coefficient_b;

    FamilyRow(double exact_scale, const RowScalars& s)
        : row(exact_scale, s),
          beta(constant<V>(s.beta)),
          w(constant<V>(1 - s.beta)),
          mean_a(constant<V>(s.mean_a)),
          mean_b(constant<V>(s.mean_b)),
          coefficient_a(constant<V>(s.coefficient_a)),
          coefficient_b(constant<V>(s.coefficient_b)) {}

    // A column and its terms. Holes: either logit may be -inf.
    template <class F, bool Holes>
    KL_INLINE Terms<V> terms(V a, V b, Column<V>& c) const {
        const V zero{}, inf = splat<V>(static_cast<S>(__builtin_inf()));
        const Mask<V> no_a = a == -inf, no_b = b == -inf;
        if constexpr (Holes) {
            a = no_a ? zero : a;
            b = no_b ? zero : b;
        }
        // So that an r past the format's range meets a probability of 0 as a number.
        const V limit = splat<V>(static_cast<S>(sizeof(S) == 4 ? 0x1p60 : 0x1p500));
        const V d = b - a, r = fma(difference_error(b, a, d), row.k, product_less(d, row, row.shift, zero));
        c.r2 = min(limit, max(-limit, r));
        c.a = power(a, row, row.lse_a);
        c.b = power(b, row, row.lse_b);
        if constexpr (Holes) {
            c.a = no_a ? zero : c.a;
            c.b = no_b ? zero : c.b;
            c.r2 = no_a ? (no_b ? zero : limit) : (no_b ? -limit : c.r2);
        }
        c.r = c.r2 * constant<V>(kLn2);
        c.beta = beta;
        c.w = w;
        Terms<V> t = F::at(c);
        if constexpr (Holes && F::infinite_where_one_is_missing) {
            // From the logits: a probability that underflows to 0 is no less finite a loss.
            t.term = (no_a ^ no_b) ? inf : t.term;
            t.flow_a = (no_b & ~no_a) ? inf : t.flow_a;
            t.flow_b = (no_a & ~no_b) ? inf : t.flow_b;
        }
        return t;
    }
};

template <class F, bool Holes, class V>
struct FamilyGradient {
    FamilyRow<V> row;

    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> at(V a, V b) const {
        Column<V> c;
        const Terms<V> t = row.template terms<F, Holes>(a, b, c);
        return {(t.flow_a - c.a * row.mean_a) * row.coefficient_a,
                (t.flow_b - c.b * row.mean_b) * row.coefficient_b};
    }
};

// In fp64 everything is ready for holes: what gets there is rare or waits for nothing.
template <class T>
inline bool may_have_holes(const RowScalars& s) {
    return std::is_same_v<T, double> || s.verdict != Verdict::plain;
}

template <class T>
inline void family_gradient_run(const T* a, const T* b, std::int64_t n, double scale,
                                const RowScalars& scalars, T* to_a, T* to_b, bool stream) {
    using V = Wide<T>;
    const FamilyRow<V> row(scale, scalars);
    with_formula(scalars.family, [&]<class F>() {
        if constexpr (!std::is_same_v<T, double>) {
            if (!may_have_holes<T>(scalars))
                return gradient_to(a, b, n, FamilyGradient<F, false, V>{row}, to_a, to_b, stream);
        }
        gradient_to(a, b, n, FamilyGradient<F, true, V>{row}, to_a, to_b, stream);
    });
}

// Steps between two foldings into fp64: 32 additions to an fp32 accumulator leave rounding well under the
// promise even where every column adds the same number.
constexpr std::int64_t kStepsPerSum = 32;

// `n` is a multiple of kStep<T>.
template <class F, bool Holes, class T>
inline FamilySums sum_steps(const T* a, const T* b, std::int64_t n, const FamilyRow<Wide<T>>& of) {
    using V = Wide<T>;
    const FamilyRow<V> row = of;
    FamilySums total;
    for (std::int64_t i = 0; i < n;) {
        const std::int64_t stop = n - i < kStepsPerSum * kStep<T> ? n : i + kStepsPerSum * kStep<T>;
        V term{}, flow_a{}, flow_b{};
        const auto add = [&](V x, V y) KL_INLINE_LAMBDA {
            Column<V> c;
            const Terms<V> t = row.template terms<F, Holes>(x, y, c);
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
inline FamilySums family_sums_run(const T* a, const T* b, std::int64_t n, double scale,
                                  const RowScalars& scalars) {
    const FamilyRow<Wide<T>> row(scale, scalars);
    return with_formula(scalars.family, [&]<class F>() {
        // What does not fill a step lies in a copy, filled up with columns that do not exist.
        const Stretch<T> in(a, b, n);
        FamilySums total;
        if constexpr (std::is_same_v<T, double>)
            total = sum_steps<F, true>(in.a, in.b, in.columns, row);
        else
            total = may_have_holes<T>(scalars) ? sum_steps<F, true>(in.a, in.b, in.columns, row)
                                               : sum_steps<F, false>(in.a, in.b, in.columns, row);
        if (in.rest > 0) total += sum_steps<F, true>(in.last_a, in.last_b, kStep<T>, row);
        return total;
    });
}

}  // namespace kl::KL_ISA
