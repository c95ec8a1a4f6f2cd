// The gradient of KL(a||b) from a row's saved scalars, column by column.
//
// With p = softmax(a), q = softmax(b) and r = log q - log p:
//     d KL / d b = q - p = p (e^r - 1)
//     d KL / d a = -p (r + KL)
// The first form has relative precision where p and q nearly agree. Nothing overflows in it as long as
// no r of the row is large, which the value's sweep has noted.
#pragma once

#include <algorithm>
#include <cmath>

#include "difference.h"
#include "elementary.h"
#include "formats.h"
#include "row.h"
#include "row_constants.h"
#include "stages.h"

namespace kl::KL_ISA {

// Where 2^r is nothing beside 1.
constexpr float kFarBelow = 100;

// A quick row's exponents of p are taken from this far below the top: |x| stays below 32, and its rounding
// below 6.6e-7 of p, down to 2^-63.
constexpr double kRaised = 31;

// How much care a row needs.
enum class Form {
    quick,    // the errors of fl(b - a), of r and of k in fp32 stay below the bound
    precise,  // they would not: all are made up for
    general,  // -inf, an r past every exponent, or a row scale so odd that its products might be too
};

inline Form form_for(double exact_scale, const RowScalars& row, bool is_fp32) {
    if (row.verdict != Verdict::plain || !(row.top_r < 100) || !(std::fabs(row.lse_a) < 0x1p20) ||
        is_odd(row.coefficient_a) || is_odd(row.coefficient_b))
        return Form::general;
    // fp32 waits for memory anyway.
    return !is_fp32 && is_good(exact_scale) && row.top_r < 16 && std::fabs(row.shift) < 8 ? Form::quick
                                                                                          : Form::precise;
}

// 2^(z k - offset). Where z is so far down that its product has lost its fraction, r is held to one:
// the result is 0 through n then, and must not become inf * 0.
template <class V>
KL_INLINE V power(V z, const RowConstants<V>& row, const Offset<V>& offset, V factor = splat<V>(1)) {
    const Reduced<V> e = reduce(clamp_for_product(fma(z, row.k, -offset.hi)));
    const V r = within_one(product_less(z, row, offset, integer(e)));
    return scale_product(exp2_fraction(r), factor, e);
}

// What a column's logits come to before the polynomials: log2 p + lse_a.lo and, for the gradient of b, r in
// a whole number and a fraction.
template <class V>
struct Begun {
    Reduced<V> log_p, ratio;
    V r;
};

// The first stage of 2^(a k - lse_a) and, in r, its logarithm.
template <class V>
KL_INLINE void begin_power(V a, const RowConstants<V>& row, Begun<V>& out) {
    out.r = fma(a, row.k, -row.lse_a.hi);
    out.log_p = reduced_product<true>(a, row, row.lse_a);
}

template <Form form, bool ToA, bool ToB, class V>
KL_INLINE Begun<V> begin_gradient(V a, V b, const RowConstants<V>& row) {
    // Held, so that nothing below overflows or loses its fraction: -1e9 is a usual mask. The gradient of a
    // has r itself for a factor, which only an inf would spoil. A quick row takes its fractions as AVX-512
    // reduces any finite exponent.
    if constexpr (form != Form::quick || kWidth < 64) {
        a = max(a, row.lowest_a);
        b = max(b, ToA ? splat<V>(-0x1p100f) : row.lowest_b);
    }

    Begun<V> out;
    if constexpr (form == Form::quick)
        out.log_p = reduce(fma(a, row.k, -row.lse_a.hi));
    else
        begin_power(a, row, out);

    const V d = b - a;
    if constexpr (form == Form::quick) {
        out.r = fma(d, row.k, -row.near_shift);
        if constexpr (ToB) out.ratio = reduce(clamp_exponent(ToA ? max(splat<V>(-kFarBelow), out.r) : out.r));
    } else {
        const V rest = fma(difference_error(b, a, d), row.k, fma(d, row.k_lo, -row.shift.lo));
        const V near = fma(d, row.k, -row.shift.hi);
        out.r = near + rest;
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

// Columns missing on one side or on both get what the limit gives, and where q is the larger by far it
// is taken as it is.
template <bool ToA, bool ToB, class V>
KL_INLINE Gradients<V> gradient_in_general(V a, V b, const RowConstants<V>& row) {
    using S = typename Traits<V>::Scalar;
    const V zero{}, minus_inf = splat<V>(-static_cast<S>(__builtin_inf()));
    const Mask<V> no_a = a == minus_inf, no_b = b == minus_inf;
    a = no_a ? zero : a;
    b = no_b ? zero : b;
    const V d = b - a;
    const V r_ = fma(difference_error(b, a, d), row.k, product_less(d, row, row.shift, zero));
    // So that an r past the format's range meets a p of 0, or of 2^-125, as a number. Where such an r
    // counts the row is vast, and fp64 works on it.
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

// What a sweep over columns asks for their gradients, at once or in two stages.
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

// The gradients of both sides, each as it comes alone: a side's bits must not depend on who else asks.
template <class OfA, class OfB>
struct Beside {
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

template <bool ToA, bool ToB, class Gradient, class V>
KL_INLINE auto begin_of(const Gradient& gradient, Pair<V> a, Pair<V> b) {
    if constexpr (requires { gradient.template begin<ToA, ToB>(a.x, b.x); }) {
        const auto x = gradient.template begin<ToA, ToB>(a.x, b.x);
        return Pair<std::remove_const_t<decltype(x)>>{x, gradient.template begin<ToA, ToB>(a.y, b.y)};
    } else {
        return Pair<Pair<V>>{{a.x, b.x}, {a.y, b.y}};
    }
}
template <bool ToA, bool ToB, class Gradient, class V>
KL_INLINE Gradients<V> end_of(const Gradient& gradient, const Pair<V>& logits) {
    return gradient.template at<ToA, ToB>(logits.x, logits.y);
}
template <bool ToA, bool ToB, class Gradient, class Begun>
KL_INLINE auto end_of(const Gradient& gradient, const Begun& x) {
    return gradient.template end<ToA, ToB>(x);
}

// A stretch whose logits and gradients share one format. `n` is a multiple of kStep<T>.
template <bool ToA, bool ToB, bool Stream, class T, class Gradient>
inline void gradient_steps(const T* a, const T* b, std::int64_t n, const Gradient& of, T* to_a, T* to_b) {
    const Gradient gradient = of;
    in_two_stages(
        n, kStep<T>,
        [&](std::int64_t i)
            KL_INLINE_LAMBDA { return begin_of<ToA, ToB>(gradient, load_pair(a + i), load_pair(b + i)); },
        [&](std::int64_t i, const auto& begun) KL_INLINE_LAMBDA {
            const auto x = end_of<ToA, ToB>(gradient, begun.x), y = end_of<ToA, ToB>(gradient, begun.y);
            if constexpr (ToA) store_pair<Stream>(to_a + i, {x.a, y.a});
            if constexpr (ToB) store_pair<Stream>(to_b + i, {x.b, y.b});
        });
}

// Any n, any alignment. What does not fill a step, or lies before the first aligned store, goes
// through a copy of one step; the arithmetic is the same, so no bit depends on where a column lies.
template <bool ToA, bool ToB, class T, class Gradient>
inline void gradient_stretch(const T* a, const T* b, std::int64_t n, const Gradient& of, T* to_a, T* to_b,
                             bool stream) {
    const auto partial = [&](std::int64_t first, std::int64_t count) {
        T part_a[kStep<T>] = {}, part_b[kStep<T>] = {}, out_a[kStep<T>], out_b[kStep<T>];
        std::memcpy(part_a, a + first, static_cast<std::size_t>(count) * sizeof(T));
        std::memcpy(part_b, b + first, static_cast<std::size_t>(count) * sizeof(T));
        gradient_steps<ToA, ToB, false>(part_a, part_b, kStep<T>, of, out_a, out_b);
        if constexpr (ToA) std::memcpy(to_a + first, out_a, static_cast<std::size_t>(count) * sizeof(T));
        if constexpr (ToB) std::memcpy(to_b + first, out_b, static_cast<std::size_t>(count) * sizeof(T));
    };
    const auto misaligned = [](const T* p) {
        return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kWidth);
    };
    std::int64_t head = 0;
    if (stream) {
        const T* out = ToB ? to_b : to_a;
        head = misaligned(out) == 0 ? 0 : (kWidth - misaligned(out)) / static_cast<std::int64_t>(sizeof(T));
        if (head > n) head = n;
        if (ToA && ToB && misaligned(to_a + head) != 0) stream = false;
    }
    const std::int64_t whole = (n - head) / kStep<T> * kStep<T>;
    if (head > 0) partial(0, head);
    T *steps_a = ToA ? to_a + head : nullptr, *steps_b = ToB ? to_b + head : nullptr;
    if (stream) {
        // A streaming store into a page that the TLB does not hold stalls the ones behind it for the
        // whole page walk: a quarter of the time at 4 KiB pages. Asked for together, the walks overlap.
        for (std::int64_t i = 0; i < n; i += 4096 / static_cast<std::int64_t>(sizeof(T))) {
            if constexpr (ToA) __builtin_prefetch(to_a + i, 1);
            if constexpr (ToB) __builtin_prefetch(to_b + i, 1);
        }
    }
    if (stream)
        gradient_steps<ToA, ToB, true>(a + head, b + head, whole, of, steps_a, steps_b);
    else
        gradient_steps<ToA, ToB, false>(a + head, b + head, whole, of, steps_a, steps_b);
    if (head + whole < n) partial(head + whole, n - head - whole);
}

template <class T, class Gradient>
inline void gradient_to(const T* a, const T* b, std::int64_t n, const Gradient& of, T* to_a, T* to_b,
                        bool stream) {
    if (to_a != nullptr && to_b != nullptr)
        gradient_stretch<true, true>(a, b, n, of, to_a, to_b, stream);
    else if (to_a != nullptr)
        gradient_stretch<true, false>(a, b, n, of, to_a, to_b, stream);
    else
        gradient_stretch<false, true>(a, b, n, of, to_a, to_b, stream);
}

template <class T>
inline void kl_gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars,
                            T* to_a, T* to_b, bool stream) {
    using V = Wide<T>;
    const auto with = [&]<Form form>() {
        constexpr bool quick = form == Form::quick;
        const KlGradient<form, V> gradient{RowConstants<V>(scale, scalars, !quick, quick ? kRaised : 0)};
        if constexpr (!quick && std::is_same_v<V, VF>) {
            const auto and_difference = [&]<bool with_low>() {
                const Difference<with_low, V> of_b(scale, scalars);
                const Beside<KlGradient<form, V>, Difference<with_low, V>> of_both{gradient, of_b};
                if (to_a == nullptr)
                    gradient_stretch<false, true>(a, b, n, of_b, to_a, to_b, stream);
                else
                    gradient_stretch<true, true>(a, b, n, of_both, to_a, to_b, stream);
            };
            if (to_b != nullptr && may_take_difference(scalars))
                return is_good(scale) ? and_difference.template operator()<false>()
                                      : and_difference.template operator()<true>();
        }
        gradient_to(a, b, n, gradient, to_a, to_b, stream);
    };
    if constexpr (std::is_same_v<T, double>) return with.template operator()<Form::general>();
    switch (form_for(scale, scalars, std::is_same_v<T, float>)) {
        case Form::quick:
            return with.template operator()<Form::quick>();
        case Form::precise:
            return with.template operator()<Form::precise>();
        case Form::general:
            return with.template operator()<Form::general>();
    }
}

// Calls take(a, b, i, n, scale) with copies in R of n columns from the i-th on: for sides of two formats, and
// for fp64 arithmetic, whose copies are scaled already.
template <class R, class Take>
inline void for_each_copy(const Row& row, std::int64_t first, std::int64_t last, Take take) {
    constexpr bool wide = std::is_same_v<R, double>;
    R a[kScratchColumns], b[kScratchColumns];
    for (std::int64_t i = first; i < last; i += kScratchColumns) {
        const std::int64_t n = last - i < kScratchColumns ? last - i : kScratchColumns;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        if constexpr (wide) {
            // As in `careful`, whose sums these columns meet.
            const auto scaled = [](double logit, double scale) {
                const double product = std::min(std::max(logit * scale, -kLargestProduct), kLargestProduct);
                return std::fabs(logit) < __builtin_inf() ? product : logit;
            };
            for (std::int64_t j = 0; j < n; ++j) {
                a[j] = scaled(a[j], row.scale_a());
                b[j] = scaled(b[j], row.scale_b());
            }
        }
        take(a, b, i, n, wide ? 1.0 : row.exact_scale());
    }
}

// Columns [first, last) of a gradient that nobody may ask for, all of them x.
inline void fill(Destination to, std::int64_t first, std::int64_t last, double x) {
    if (to.data == nullptr) return;
    in_format(to.dtype, [&]<class T>() {
        T rounded;
        round_one(x, rounded);
        std::fill_n(static_cast<T*>(to.data) + first, last - first, rounded);
    });
}

}  // namespace kl::KL_ISA
