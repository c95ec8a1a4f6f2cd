// The gradient of KL(a||b) from a row's saved scalars, column by column.
//
// With p = softmax(a), q = softmax(b) and r = log q - log p:
//     d KL / d b = q - p = sign(r) max(p, q) (1 - e^-|r|)
//     d KL / d a = -p (r + KL)
// The first form has relative precision where p and q nearly agree, and nothing in it overflows.
#pragma once

#include "elementary.h"
#include "formats.h"
#include "row.h"

namespace kl::KL_ISA {

template <class V>
struct RowConstants {
    V k, k_lo;
    V lse_a_hi, lse_a_lo, lse_b_hi, lse_b_lo, shift_hi, shift_lo, divergence;
    V coefficient_a, coefficient_b;

    RowConstants(double exact_scale, const RowScalars& row) {
        using S = typename Traits<V>::Scalar;
        const auto all = [](double x) { return splat<V>(static_cast<S>(x)); };
        const auto low = [](double x) { return x - static_cast<double>(static_cast<S>(x)); };
        k = all(exact_scale);
        k_lo = all(low(exact_scale));
        // The sums behind lse were taken with k rounded to S. What that leaves out is a factor
        // 2^((z - lse/k) k_lo), which a token far below the top feels.
        const double share = low(exact_scale) / exact_scale;
        const auto split = [&](double lse, V& hi, V& lo) {
            const bool small = lse > -2048 && lse < 2048;
            const double top = small ? static_cast<double>(static_cast<int>(lse * 4096)) / 4096
                                     : static_cast<double>(static_cast<S>(lse));
            hi = all(top);
            lo = all(lse - top + lse * share);
        };
        split(row.lse_a, lse_a_hi, lse_a_lo);
        split(row.lse_b, lse_b_hi, lse_b_lo);
        shift_hi = all(row.shift);
        shift_lo = all(low(row.shift));
        divergence = all(row.divergence * kLog2e);
        coefficient_a = all(-row.coefficient_a * kLn2);
        coefficient_b = all(row.coefficient_b);
    }
};

// 2^(z k - lse), with one rounding of an argument that is at most 1/2: lse_hi lies on a grid so coarse
// that adding an integer to it is exact. Rounding z k - lse itself would cost 2e-6 at 2^-64.
// Where z is so far down that its product has lost its fraction, r is held to one: the result is 0
// through n then, and must not become inf * 0.
template <class V>
KL_INLINE V probability(V z, const RowConstants<V>& row, V lse_hi, V lse_lo) {
    Reduced<V> e = reduce(clamp_exponent(fma(z, row.k, -lse_hi)));
    e.r = within_one(fma(z, row.k, -(lse_hi + integer(e))) + fma(z, row.k_lo, -lse_lo));
    return exp2_reduced(e);
}

template <class V>
struct Gradients {
    V a, b;
};

template <bool Exact, bool Holes, bool ToA, bool ToB, class V>
KL_INLINE Gradients<V> gradient_of(V a, V b, const RowConstants<V>& row) {
    using S = typename Traits<V>::Scalar;
    const V zero{};
    Mask<V> no_a{}, no_b{};
    if constexpr (Holes) {
        no_a = a == splat<V>(-static_cast<S>(__builtin_inf()));
        no_b = b == splat<V>(-static_cast<S>(__builtin_inf()));
        a = no_a ? zero : a;
        b = no_b ? zero : b;
    }
    const V d = b - a;
    V r = fma(d, row.k, -row.shift_hi);
    if constexpr (Exact)
        r += fma(difference_error(b, a, d), row.k, -row.shift_lo);
    else
        r -= row.shift_lo;
    // So that an r past the format's range meets a p of 0, or of 2^-125, as a number. Where such an r
    // counts the row is vast, and fp64 works on it.
    if constexpr (Holes) {
        constexpr S limit = static_cast<S>(sizeof(S) == 4 ? 0x1p60 : 0x1p500);
        r = min(max(r, splat<V>(-limit)), splat<V>(limit));
    }

    Gradients<V> out{zero, zero};
    if constexpr (ToA) {
        const V p = probability(a, row, row.lse_a_hi, row.lse_a_lo);
        out.a = p * (r + row.divergence) * row.coefficient_a;
        if constexpr (Holes) out.a = no_a ? zero : out.a;
    }
    if constexpr (ToB) {
        const Mask<V> b_larger = r > zero;
        const V larger = probability(b_larger ? b : a, row, b_larger ? row.lse_b_hi : row.lse_a_hi,
                                            b_larger ? row.lse_b_lo : row.lse_a_lo);
        V difference = with_sign(larger * one_minus_exp2_neg(r), r);
        if constexpr (Holes) {
            const V p = probability(a, row, row.lse_a_hi, row.lse_a_lo);
            const V q = probability(b, row, row.lse_b_hi, row.lse_b_lo);
            difference = no_a ? q : no_b ? -p : difference;
            difference = (no_a & no_b) ? zero : difference;
        }
        out.b = difference * row.coefficient_b;
    }
    return out;
}

// A stretch whose logits and gradients share one format. `n` is a multiple of kStep<T>.
template <bool Exact, bool Holes, bool ToA, bool ToB, bool Stream, class T>
inline void gradient_steps(const T* a, const T* b, std::int64_t n, const RowConstants<Wide<T>>& row, T* to_a, T* to_b) {
    const RowConstants<Wide<T>> constants = row;
    for (std::int64_t i = 0; i < n; i += kStep<T>) {
        const auto va = load_pair(a + i), vb = load_pair(b + i);
        const auto x = gradient_of<Exact, Holes, ToA, ToB>(va.x, vb.x, constants);
        const auto y = gradient_of<Exact, Holes, ToA, ToB>(va.y, vb.y, constants);
        if constexpr (ToA) store_pair<Stream>(to_a + i, {x.a, y.a});
        if constexpr (ToB) store_pair<Stream>(to_b + i, {x.b, y.b});
    }
}

// Any n, any alignment. What does not fill a step, or lies before the first aligned store, goes
// through a copy of one step; the arithmetic is the same, so no bit depends on where a column lies.
template <bool Exact, bool Holes, bool ToA, bool ToB, class T>
inline void gradient_stretch(const T* a, const T* b, std::int64_t n, const RowConstants<Wide<T>>& row, T* to_a, T* to_b,
                             bool stream) {
    const auto partial = [&](std::int64_t first, std::int64_t count) {
        T part_a[kStep<T>] = {}, part_b[kStep<T>] = {}, out_a[kStep<T>], out_b[kStep<T>];
        std::memcpy(part_a, a + first, static_cast<std::size_t>(count) * sizeof(T));
        std::memcpy(part_b, b + first, static_cast<std::size_t>(count) * sizeof(T));
        gradient_steps<Exact, Holes, ToA, ToB, false>(part_a, part_b, kStep<T>, row, out_a, out_b);
        if constexpr (ToA) std::memcpy(to_a + first, out_a, static_cast<std::size_t>(count) * sizeof(T));
        if constexpr (ToB) std::memcpy(to_b + first, out_b, static_cast<std::size_t>(count) * sizeof(T));
    };
    const auto misaligned = [](const T* p) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kWidth); };
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
    if (stream)
        gradient_steps<Exact, Holes, ToA, ToB, true>(a + head, b + head, whole, row, steps_a, steps_b);
    else
        gradient_steps<Exact, Holes, ToA, ToB, false>(a + head, b + head, whole, row, steps_a, steps_b);
    if (head + whole < n) partial(head + whole, n - head - whole);
}

template <class T>
inline void gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars, T* to_a, T* to_b,
                         bool stream) {
    const RowConstants<Wide<T>> row(scale, scalars);
    const bool holes = scalars.verdict != Verdict::plain;
    // Where the sides' lse are close, the error of fl(b - a) is below the bound: 2^-24 * 16 or, for a
    // larger difference, damped by e^-|r|. fp32 waits for memory anyway and takes the full precision.
    const double shift = scalars.shift < 0 ? -scalars.shift : scalars.shift;
    const bool exact = std::is_same_v<T, float> || (!std::is_same_v<T, double> && shift >= 8);
    const auto with = [&]<bool Exact, bool Holes>() {
        if (to_a != nullptr && to_b != nullptr)
            gradient_stretch<Exact, Holes, true, true>(a, b, n, row, to_a, to_b, stream);
        else if (to_a != nullptr)
            gradient_stretch<Exact, Holes, true, false>(a, b, n, row, to_a, to_b, stream);
        else
            gradient_stretch<Exact, Holes, false, true>(a, b, n, row, to_a, to_b, stream);
    };
    if (exact && holes)
        with.template operator()<true, true>();
    else if (exact)
        with.template operator()<true, false>();
    else if (holes)
        with.template operator()<false, true>();
    else
        with.template operator()<false, false>();
}

// `first` to `last` of a row, through copies in R: for sides of two formats, and for fp64 arithmetic.
template <class R>
inline void gradient_through_copies(const Row& row, const RowScalars& scalars, Destination to_a, Destination to_b,
                                    std::int64_t first, std::int64_t last) {
    constexpr bool wide = std::is_same_v<R, double>;
    R a[kScratchColumns], b[kScratchColumns], out_a[kScratchColumns], out_b[kScratchColumns];
    for (std::int64_t i = first; i < last; i += kScratchColumns) {
        const std::int64_t n = last - i < kScratchColumns ? last - i : kScratchColumns;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        if constexpr (wide) {
            for (std::int64_t j = 0; j < n; ++j) {
                a[j] *= row.scale_a();
                b[j] *= row.scale_b();
            }
        }
        const double scale = wide ? 1.0 : row.exact_scale();
        gradient_run<R>(a, b, n, scale, scalars, to_a.data ? out_a : nullptr, to_b.data ? out_b : nullptr, false);
        if (to_a.data) round_run(out_a, n, to_a.data, to_a.dtype, i);
        if (to_b.data) round_run(out_b, n, to_b.data, to_b.dtype, i);
    }
}

}  // namespace kl::KL_ISA
