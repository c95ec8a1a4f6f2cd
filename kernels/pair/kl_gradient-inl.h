// The gradient of KL(a||b) from a row's saved scalars, column by column.
//
// With p = softmax(a), q = softmax(b) and r = log q - log p:
//     d KL / d b = q - p = p (e^r - 1)
//     d KL / d a = -p (r + KL)
// The first form has relative precision where p and q nearly agree. Nothing overflows in it as long as
// no r of the row is large, which the value's sweep has noted.
#pragma once

#include <cmath>

#include "isa/entries-inl.h"
#include "pair/difference-inl.h"
#include "pair/gradient_loop-inl.h"
#include "pair/label-inl.h"

namespace kl::KL_ISA {

// Where 2^r is nothing beside 1.
constexpr float kFarBelow = 100;
// No r of the fast path's rows is larger where p is not 0.
constexpr float kFarAbove = 100, kLargestR = 0x1.8p126f;

// On the fast path exponents of p are measured from this far below the top: |x| stays below 32, and its
// rounding below 6.6e-7 of p, down to 2^-63.
constexpr double kRaised = 31;

// The arithmetic that a row needs.
enum class Form {
    fast,     // the rounding errors of b - a, of r and of k in fp32 stay below the bound
    precise,  // they would exceed it: each is computed and added
    general,  // -inf on one side, an r past every exponent, or a row scale so odd that its products might be
              // too
};

inline Form form_for(double exact_scale, const RowScalars& row, bool is_fp32) {
    const bool is_plain = row.row_class == RowClass::all_finite || row.row_class == RowClass::masked;
    // b's gradient is a difference then, and a's takes any r.
    const bool takes_all = may_take_difference(row) && row.row_class != RowClass::infinite;
    if (!(takes_all || (is_plain && row.top_r < 100)) || !(std::fabs(row.lse_a) < 0x1p20) ||
        is_odd(row.coefficient_a) || is_odd(row.coefficient_b))
        return Form::general;
    // Logits in fp32 keep the loop waiting for memory, so the fast path would gain nothing there.
    const bool fast =
        is_plain && !is_fp32 && is_good(exact_scale) && row.top_r < 16 && std::fabs(row.shift) < 16;
    return fast ? Form::fast : Form::precise;
}

template <Form form, bool ToA, bool ToB, class V>
KL_INLINE Begun<V> begin_gradient(V a, V b, const RowConstants<V>& row) {
    // Logits are clamped so that nothing below overflows or loses its fraction: -1e9 is a usual mask. The
    // gradient of a multiplies by r itself, which only an inf would spoil. AVX-512 reduces any exponent, so
    // the fast path needs no clamp there but that of an r where both are -inf.
    [[maybe_unused]] const Mask<V> no_a = a < row.lowest_a;
    if constexpr (form != Form::fast || kWidth < 64) {
        a = max(a, row.lowest_a);
        b = max(b, ToA ? splat<V>(-0x1p125f) : row.lowest_b);
    }

    Begun<V> out;
    if constexpr (form == Form::fast)
        out.log_p = reduce(fma(a, row.k, -row.lse_a.hi));
    else
        begin_power(a, row, out);

    const V d = b - a;
    if constexpr (form == Form::fast) {
        const V r = fma(d, row.k, -row.near_shift);
        if constexpr (ToA) out.r = kWidth < 64 ? (no_a ? V{} : r) : within(r, splat<V>(kLargestR));
        if constexpr (ToB) {
            const V held = kWidth < 64 ? r : within(r, splat<V>(kFarAbove));
            out.ratio = reduce(clamp_exponent(ToA ? max(splat<V>(-kFarBelow), held) : held));
        }
    } else {
        const V rest = fma(difference_error(b, a, d), row.k, fma(d, row.k_lo, -row.shift.lo));
        const V near = fma(d, row.k, -row.shift.hi);
        out.r = near + rest;
        // A column that is -inf on both sides: 2^-240 times an r of -2^100 would be a subnormal number.
        if constexpr (ToA) out.r = no_a ? V{} : out.r;
        if constexpr (ToB) {
            out.ratio = reduce(clamp_exponent(ToA ? max(splat<V>(-kFarBelow), near) : near));
            out.ratio.r = fma(d, row.k, -(row.shift.hi + integer(out.ratio))) + rest;
            if constexpr (ToA || kWidth < 64) out.ratio.r = within_one(out.ratio.r);
        }
    }
    return out;
}

template <Form form, bool ToA, bool ToB, class V>
KL_INLINE Gradients<V> end_gradient(const Begun<V>& x, const RowConstants<V>& row) {
    const V fraction = exp2_fraction(x.log_p.r);
    Gradients<V> out{};
    if constexpr (ToA)
        out.a = scale_product(fraction, mad(x.r, row.factor_a, row.divergence * row.factor_a), x.log_p);
    if constexpr (ToB)
        out.b = scale_product(fraction, exp2m1_split(x.ratio.r, scaled(row.factor_b, x.ratio), row.factor_b),
                              x.log_p);
    return out;
}

// Columns that are -inf on one side or on both get the formula's limit. Where q is the larger, q - p is taken
// from q.
template <bool ToA, bool ToB, class V>
KL_INLINE Gradients<V> gradient_in_general(V a, V b, const RowConstants<V>& row) {
    using S = typename Traits<V>::Scalar;
    const V zero{}, minus_inf = splat<V>(-static_cast<S>(__builtin_inf()));
    const Mask<V> no_a = a == minus_inf, no_b = b == minus_inf;
    a = no_a ? zero : a;
    b = no_b ? zero : b;
    const V r_ = log_ratio(a, b, row);
    // So that an r past the format's range meets a p of 0, or of 2^-125, as a number. Where such an r
    // counts the row is out of range, and fp64 works on it.
    const V limit = splat<V>(static_cast<S>(sizeof(S) == 4 ? 0x1p60 : 0x1p500));
    const V r = min(max(r_, -limit), limit);
    const V p = power(a, row, row.lse_a), q = power(b, row, row.lse_b);

    Gradients<V> out{};
    if constexpr (ToA) out.a = no_a ? zero : p * (r + row.divergence) * row.coefficient_a;
    if constexpr (ToB) {
        V difference = with_sign((r > zero ? q : p) * -exp2m1(-abs(r)), r);
        difference = no_a ? q : no_b ? -p : difference;
        out.b = ((no_a & no_b) ? zero : difference) * row.coefficient_b;
    }
    return out;
}

// The gradient of a where D is large: -p (r + D), of any logits. r and D come in fourths, since an r of the
// lowest number in units of ln 2 is more than fp32 holds.
template <bool WithLow>
struct FarGradient {
    RowConstants<VF> row;
    VF k, shift, divergence, factor;

    FarGradient(double scale, const RowScalars& scalars)
        : row(scale, scalars, WithLow),
          k(splat<VF>(static_cast<float>(scale / 4))),
          shift(splat<VF>(static_cast<float>(scalars.shift / 4))),
          divergence(splat<VF>(static_cast<float>(scalars.divergence * kLog2e / 4))),
          factor(row.factor_a * splat<VF>(4)) {}

    template <bool ToA, bool ToB>
    KL_INLINE Begun<VF> begin(VF a, VF b) const {
        Begun<VF> out;
        const VF r = within(fma(b - a, k, -shift), splat<VF>(kLargestR)) + divergence;
        out.r = a < row.lowest_a ? VF{} : r;
        out.log_p = reduced_product<WithLow>(max(a, row.lowest_a), row, row.lse_a);
        return out;
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> end(const Begun<VF>& x) const {
        return {scale_product(exp2_fraction(x.log_p.r), x.r, x.log_p) * factor, VF{}};
    }
};

// KL's formula for the loop of gradient_loop-inl.h.
template <Form form, class V>
struct KlGradient {
    RowConstants<V> row;

    template <bool ToA, bool ToB>
    KL_INLINE Begun<V> begin(V a, V b) const
        requires(form != Form::general)
    {
        return begin_gradient<form, ToA, ToB>(a, b, row);
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> end(const Begun<V>& x) const {
        return end_gradient<form, ToA, ToB>(x, row);
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> at(V a, V b) const {
        return gradient_in_general<ToA, ToB>(a, b, row);
    }
};

// Both sides' gradients, each as it is alone: its bits must not depend on whether the other was asked for.
template <class OfA, class OfB>
struct BothSides {
    struct Steps {
        Begun<VF> a;
        typename OfB::Begun b;
    };

    OfA of_a;
    OfB of_b;

    template <bool ToA, bool ToB>
    KL_INLINE Steps begin(VF a, VF b) const
        requires requires { of_a.template begin<true, false>(a, b); }
    {
        return {of_a.template begin<true, false>(a, b), of_b.template begin<false, true>(a, b)};
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> end(const Steps& x) const {
        return {of_a.template end<true, false>(x.a).a, of_b.template end<false, true>(x.b).b};
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> at(VF a, VF b) const {
        return {of_a.template at<true, false>(a, b).a,
                of_b.template end<false, true>(of_b.template begin<false, true>(a, b)).b};
    }
};

template <class V>
constexpr bool asks_at_each_store<KlGradient<Form::general, V>> = true;

// A side's gradient with a label's columns added before it is rounded.
template <class Of>
struct WithLabel {
    struct Steps {
        decltype(std::declval<const Of&>().template begin<false, true>(VF{}, VF{})) of;
        Reduced<VF> label;
    };

    Of of;
    LabelColumns<VF> label;

    template <bool ToA, bool ToB>
    KL_INLINE Steps begin(VF a, VF b) const {
        return {of.template begin<ToA, ToB>(a, b), label.begin(ToA ? a : b)};
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> end(const Steps& x) const {
        Gradients<VF> out = of.template end<ToA, ToB>(x.of);
        (ToA ? out.a : out.b) += label.end(x.label);
        return out;
    }
};

// The gradient of b with a label's columns at the row's own temperature: p (factor (e^r - 1) + label e^r).
template <Form form>
struct WithOwnLabel {
    RowConstants<VF> row;  // its factor of b is the sum of both
    VF label;

    WithOwnLabel(double scale, const RowScalars& scalars, double factor)
        : row(scale, with(scalars, factor), form != Form::fast, form == Form::fast ? kRaised : 0),
          label(row.factor_b * splat<VF>(static_cast<float>(factor / (scalars.coefficient_b + factor)))) {}

    template <bool ToA, bool ToB>
    KL_INLINE Begun<VF> begin(VF a, VF b) const {
        return begin_gradient<form, ToA, ToB>(a, b, row);
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> end(const Begun<VF>& x) const {
        const VF both = exp2m1_split(x.ratio.r, scaled(row.factor_b, x.ratio), row.factor_b) + label;
        return {VF{}, scale_product(exp2_fraction(x.log_p.r), both, x.log_p)};
    }

private:
    static RowScalars with(RowScalars scalars, double factor) {
        scalars.coefficient_b += factor;
        return scalars;
    }
};

template <class T>
bool kl_gradient_with_label(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars,
                            const LabelTerm& label, T* to_a, T* to_b, bool non_temporal) {
    if constexpr (std::is_same_v<T, double>)
        return false;
    else {
        if ((to_a != nullptr) != label.of_a || (to_b != nullptr) == label.of_a) return false;
        const LabelColumns<VF> columns(label.scale, label);
        const auto go = [&](const auto& of) {
            const WithLabel<std::remove_cvref_t<decltype(of)>> both{of, columns};
            if (label.of_a)
                gradient_span<true, false>(a, b, n, both, to_a, to_b, non_temporal);
            else
                gradient_span<false, true>(a, b, n, both, to_a, to_b, non_temporal);
        };
        const Form form = form_for(scale, scalars, std::is_same_v<T, float>);
        // q is at hand where the label's is at the row's temperature.
        const bool own = to_b != nullptr && label.scale == scale && label.factor * scalars.coefficient_b > 0;
        const auto go_own = [&](const auto& of) {
            gradient_span<false, true>(a, b, n, of, to_a, to_b, non_temporal);
        };
        if (form == Form::fast && !std::is_same_v<T, float>) {
            if (own)
                go_own(WithOwnLabel<Form::fast>(scale, scalars, label.factor));
            else
                go(KlGradient<Form::fast, VF>{RowConstants<VF>(scale, scalars, false, kRaised)});
        } else if (to_b != nullptr && may_take_difference(scalars)) {
            if (own)
                go_own(Difference<true, VF>(scale, scalars, label.factor));
            else
                go(Difference<true, VF>(scale, scalars));
        } else if (form == Form::general) {
            return false;
        } else if (own) {
            go_own(WithOwnLabel<Form::precise>(scale, scalars, label.factor));
        } else {
            go(KlGradient<Form::precise, VF>{RowConstants<VF>(scale, scalars, true, 0)});
        }
        return true;
    }
}

template <class T>
void kl_gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars, T* to_a,
                     T* to_b, bool non_temporal) {
    using V = Wide<T>;
    const auto with = [&]<Form form>() {
        constexpr bool fast = form == Form::fast;
        const KlGradient<form, V> gradient{RowConstants<V>(scale, scalars, !fast, fast ? kRaised : 0)};
        if constexpr (!fast && std::is_same_v<V, VF>) {
            const auto and_difference = [&](const auto& of_a, const auto& of_b) {
                using Both =
                    BothSides<std::remove_cvref_t<decltype(of_a)>, std::remove_cvref_t<decltype(of_b)>>;
                if (to_a == nullptr)
                    gradient_span<false, true>(a, b, n, of_b, to_a, to_b, non_temporal);
                else
                    gradient_span<true, true>(a, b, n, Both{of_a, of_b}, to_a, to_b, non_temporal);
            };
            const auto in_parts = [&]<bool with_low>() {
                const Difference<with_low, V> of_b(scale, scalars);
                if (!may_take_far(scalars)) return and_difference(gradient, of_b);
                const FarGradient<with_low> of_a(scale, scalars);
                if (to_b != nullptr) return and_difference(of_a, of_b);
                gradient_span<true, false>(a, b, n, of_a, to_a, to_b, non_temporal);
            };
            if (may_take_difference(scalars) && (to_b != nullptr || may_take_far(scalars)))
                return is_good(scale) ? in_parts.template operator()<false>()
                                      : in_parts.template operator()<true>();
        }
        gradient_to(a, b, n, gradient, to_a, to_b, non_temporal);
    };
    if constexpr (std::is_same_v<T, double>)
        return with.template operator()<Form::general>();
    else {
        const Form form = form_for(scale, scalars, std::is_same_v<T, float>);
        if constexpr (!std::is_same_v<T, float>)
            if (form == Form::fast) return with.template operator()<Form::fast>();
        if (form == Form::precise) return with.template operator()<Form::precise>();
        with.template operator()<Form::general>();
    }
}

}  // namespace kl::KL_ISA
