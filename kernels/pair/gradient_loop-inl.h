// The loop of every gradient: columns from the logits to memory, software pipelined where the formula allows.
//
// A gradient is a struct with at<ToA, ToB>(a, b), or with begin<ToA, ToB>(a, b) and end<ToA, ToB>(begun) for
// a loop whose steps overlap; both give Gradients<V>.
#pragma once

#include <cmath>
#include <type_traits>

#include "pair/row_constants-inl.h"
#include "simd/elementary-inl.h"
#include "simd/formats-inl.h"
#include "simd/pipeline-inl.h"

namespace kl::KL_ISA {

// 2^(z k - offset). Where z is so far down that its product has lost its fraction, r is held to one:
// the result is 0 through n then, and must not become inf * 0.
template <class V>
KL_INLINE V power(V z, const RowConstants<V>& row, const Offset<V>& offset, V factor = splat<V>(1)) {
    const Reduced<V> e = reduce(clamp_for_product(fma(z, row.k, -offset.hi)));
    const V r = within_one(product_less(z, row, offset, integer(e)));
    return scale_product(exp2_fraction(r), factor, e);
}

// A column before the polynomials: log2 p + lse_a.lo and, for b's gradient, r, both range-reduced.
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

// Whether one loop serves both ways to store, as every loop for both sides does: see put().
template <class Gradient>
constexpr bool asks_at_each_store = false;

// A span whose logits and gradients share one format. `n` is a multiple of kStep<T>.
template <bool ToA, bool ToB, class T, class Gradient, class NonTemporal>
KL_NOINLINE void gradient_steps(const T* a, const T* b, std::int64_t n, const Gradient& of, T* to_a, T* to_b,
                                NonTemporal non_temporal) {
    const Gradient gradient = of;
    pipelined(
        n, kStep<T>,
        [&](std::int64_t i)
            KL_INLINE_LAMBDA { return begin_of<ToA, ToB>(gradient, load_pair(a + i), load_pair(b + i)); },
        [&](std::int64_t i, const auto& begun) KL_INLINE_LAMBDA {
            const auto x = end_of<ToA, ToB>(gradient, begun.x), y = end_of<ToA, ToB>(gradient, begun.y);
            if constexpr (ToA) store_pair(non_temporal, to_a + i, Pair{x.a, y.a});
            if constexpr (ToB) store_pair(non_temporal, to_b + i, Pair{x.b, y.b});
        });
}

// Any n, any alignment. Columns that do not fill a step, or lie before the first aligned store, go through a
// copy of one step. The arithmetic is the same, so no bit depends on where a column lies.
template <bool ToA, bool ToB, class T, class Gradient>
inline void gradient_span(const T* a, const T* b, std::int64_t n, const Gradient& of, T* to_a, T* to_b,
                          bool non_temporal) {
    constexpr bool asks = asks_at_each_store<Gradient> || (ToA && ToB);
    const std::conditional_t<asks, bool, std::false_type> cached{};
    const auto partial = [&](std::int64_t first, std::int64_t count) {
        T part_a[kStep<T>] = {}, part_b[kStep<T>] = {}, out_a[kStep<T>], out_b[kStep<T>];
        std::memcpy(part_a, a + first, static_cast<std::size_t>(count) * sizeof(T));
        std::memcpy(part_b, b + first, static_cast<std::size_t>(count) * sizeof(T));
        gradient_steps<ToA, ToB>(part_a, part_b, kStep<T>, of, out_a, out_b, cached);
        if constexpr (ToA) std::memcpy(to_a + first, out_a, static_cast<std::size_t>(count) * sizeof(T));
        if constexpr (ToB) std::memcpy(to_b + first, out_b, static_cast<std::size_t>(count) * sizeof(T));
    };
    const auto misaligned = [](const T* p) {
        return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) % kWidth);
    };
    std::int64_t head = 0;
    if (non_temporal) {
        const T* out = ToB ? to_b : to_a;
        head = misaligned(out) == 0 ? 0 : (kWidth - misaligned(out)) / static_cast<std::int64_t>(sizeof(T));
        if (head > n) head = n;
        if (ToA && ToB && misaligned(to_a + head) != 0) non_temporal = false;
    }
    const std::int64_t whole = (n - head) / kStep<T> * kStep<T>;
    if (head > 0) partial(0, head);
    T *steps_a = ToA ? to_a + head : nullptr, *steps_b = ToB ? to_b + head : nullptr;
    if (non_temporal) {
        // A non-temporal store into a page that the TLB does not hold stalls the ones behind it for the
        // whole page walk: a quarter of the time at 4 KiB pages. Asked for together, the walks overlap.
        for (std::int64_t i = 0; i < n; i += 4096 / static_cast<std::int64_t>(sizeof(T))) {
            if constexpr (ToA) __builtin_prefetch(to_a + i, 1);
            if constexpr (ToB) __builtin_prefetch(to_b + i, 1);
        }
    }
    const auto steps = [&](auto how) {
        gradient_steps<ToA, ToB>(a + head, b + head, whole, of, steps_a, steps_b, how);
    };
    if constexpr (asks)
        steps(non_temporal);
    else if (non_temporal && !std::is_same_v<T, double>)  // fp64 goes through copies, in cache
        steps(std::bool_constant<!std::is_same_v<T, double>>{});
    else
        steps(cached);
    if (head + whole < n) partial(head + whole, n - head - whole);
}

template <class T, class Gradient>
inline void gradient_to(const T* a, const T* b, std::int64_t n, const Gradient& of, T* to_a, T* to_b,
                        bool non_temporal) {
    if (to_a != nullptr && to_b != nullptr)
        gradient_span<true, true>(a, b, n, of, to_a, to_b, non_temporal);
    else if (to_a != nullptr)
        gradient_span<true, false>(a, b, n, of, to_a, to_b, non_temporal);
    else
        gradient_span<false, true>(a, b, n, of, to_a, to_b, non_temporal);
}

}  // namespace kl::KL_ISA
