// A row's saved scalars as vectors: the factor of its logits and what is subtracted from the products.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd/elementary-inl.h"
#include "pair/row.h"

namespace kl::KL_ISA {

// Whether an fp32 product with it may underflow or overflow.
inline bool is_odd(double coefficient) {
    return !(std::fabs(coefficient) > 0x1p-60 && std::fabs(coefficient) < 0x1p20);
}

// Whether log2(e) / temperature is near enough to an fp32 for its error to stay out of the promises.
inline bool is_good(double exact_scale) {
    const double rounded = static_cast<double>(static_cast<float>(exact_scale));
    return std::fabs(rounded - exact_scale) < 1.5e-8 * exact_scale;
}

// A number to subtract from a product: its high part lies on a grid so coarse that adding an integer
// to it is exact.
template <class V>
struct Offset {
    V hi, lo;

    // The sums behind an lse were taken with k rounded to V's scalar. What that leaves out is a factor
    // 2^((z - lse/k) k_lo), which a token far below the top feels: `correction` is lse k_lo/k, for those who
    // add z k_lo, and 0 for the others.
    Offset(double x, double correction) {
        using S = typename Traits<V>::Scalar;
        const double top = static_cast<double>(static_cast<S>(on_grid(x)));
        hi = splat<V>(static_cast<S>(top));
        lo = splat<V>(static_cast<S>(x - top + correction));
    }

private:
    // An integer that counts is at most RowConstants::kNothing and a little. Up to 2048 a multiple of 2^-12
    // leaves fp32 room for it, and up to 2^20, where fp64 takes over, a number of 22 bits does: one of 24
    // would lose its last bit in a sum that reaches the next power of 2.
    static double on_grid(double x) {
        if (std::fabs(x) < 2048) return static_cast<double>(static_cast<int>(x * 4096)) / 4096;
        if (std::is_same_v<V, VD> || !(std::fabs(x) < 0x1p21)) return x;
        int exponent;
        const double fraction = std::frexp(x, &exponent);
        return std::ldexp(std::nearbyint(std::ldexp(fraction, 22)), exponent - 22);
    }
};

template <class V>
struct RowConstants {
    using S = typename Traits<V>::Scalar;

    V k, k_lo;
    Offset<V> lse_a, lse_b, shift;
    V near_shift;          // in one number
    V divergence;          // in units of ln 2
    V lowest_a, lowest_b;  // logits whose p and q are nothing in any format
    bool is_apart;         // lse(b) - lse(a) is too large to be subtracted from b - a
    V coefficient_a, coefficient_b;
    V factor_a, factor_b;  // the coefficients, with what lse_a.hi leaves of lse_a

    // with_low: the caller adds the product with k_lo to the one with k. raised: how far above log2 p the
    // exponents lie that subtracting lse_a.hi leaves; the factors take it back. raised_b: the same of b.
    RowConstants(double exact_scale, const RowScalars& row, bool with_low = true, double raised = 0,
                 double raised_b = 0)
        : k(splat<V>(static_cast<S>(exact_scale))),
          k_lo(splat<V>(static_cast<S>(low(exact_scale)))),
          lse_a(row.lse_a - raised, with_low ? row.lse_a * share(exact_scale) : 0),
          lse_b(row.lse_b - raised_b, with_low ? row.lse_b * share(exact_scale) : 0),
          shift(row.shift, with_low ? row.shift * share(exact_scale) : 0),
          near_shift(splat<V>(static_cast<S>(row.shift))),
          divergence(splat<V>(static_cast<S>(row.divergence * kLog2e))),
          lowest_a(splat<V>(static_cast<S>((row.lse_a - kNothing) / exact_scale))),
          lowest_b(splat<V>(static_cast<S>((row.lse_b - kNothing) / exact_scale))),
          is_apart(std::fabs(row.shift) > 0x1p20),
          coefficient_a(splat<V>(static_cast<S>(-row.coefficient_a * kLn2))),
          coefficient_b(splat<V>(static_cast<S>(row.coefficient_b))) {
        const double rest = std::exp2(-static_cast<double>(lse_a.lo[0]) - raised);
        factor_a = splat<V>(static_cast<S>(-row.coefficient_a * kLn2 * rest));
        factor_b = splat<V>(static_cast<S>(row.coefficient_b * rest));
    }

private:
    // Below every format's smallest number, and well within what clamp_for_product lets through.
    static constexpr double kNothing = 240;

    static double low(double x) { return x - static_cast<double>(static_cast<S>(x)); }
    static double share(double x) { return low(x) / x; }
};

// z k - offset - n: one rounding, of a result that is small where it counts.
template <class V>
KL_INLINE V product_less(V z, const RowConstants<V>& row, const Offset<V>& offset, V n) {
    return fma(z, row.k, -(offset.hi + n)) + fma(z, row.k_lo, -offset.lo);
}

// log2 q - log2 p, of finite logits. Only rows in fp64 may be apart.
template <class V>
KL_INLINE V log_ratio(V a, V b, const RowConstants<V>& row) {
    const V zero{}, d = b - a;
    if constexpr (std::is_same_v<V, VD>) {
        if (row.is_apart)
            return product_less(b, row, row.lse_b, zero) - product_less(a, row, row.lse_a, zero);
    }
    return fma(difference_error(b, a, d), row.k, product_less(d, row, row.shift, zero));
}

template <class V>
struct Gradients {
    V a, b;
};

// z k - offset.hi, reduced; offset.lo is the caller's to make up for. z is not below the row's lowest.
template <bool WithLow, class V>
KL_INLINE Reduced<V> reduced_product(V z, const RowConstants<V>& row, const Offset<V>& offset) {
    Reduced<V> e = reduce(fma(z, row.k, -offset.hi));
    e.r = fma(z, row.k, -(offset.hi + integer(e)));
    if constexpr (WithLow) e.r = fma(z, row.k_lo, e.r);
    return e;
}

}  // namespace kl::KL_ISA
