// Exponentials in base 2, so that the range reduction is exact and needs one subtraction.
// Errors are stated in ulp of the result (units of 2^-24 relative for fp32) and are what
// tests/test_native.py asserts over every exponent and 10^7 points.
#pragma once

#include <type_traits>

#include "simd/vectors-inl.h"

namespace kl::KL_ISA {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;

template <class V, int N>
KL_INLINE V horner(const double (&c)[N], V x) {
    using S = typename Traits<V>::Scalar;
    V p = splat<V>(static_cast<S>(c[N - 1]));
    for (int i = N - 2; i >= 0; --i) p = mad(p, x, splat<V>(static_cast<S>(c[i])));
    return p;
}

template <class V, int N>
KL_INLINE V horner(const V (&c)[N], V x) {
    V p = c[N - 1];
    for (int i = N - 2; i >= 0; --i) p = mad(p, x, c[i]);
    return p;
}

#if KL_NEON
// Coefficients as vectors in memory, one after another.
template <const auto& coefficients>
struct Splats {
    static constexpr int n = sizeof(coefficients) / sizeof(double);
    struct Values {
        alignas(kWidth) float of[n][lanes<VF>];
    };
    static constexpr Values values = [] {
        Values out{};
        for (int i = 0; i < n; ++i)
            for (float& x : out.of[i]) x = static_cast<float>(coefficients[i]);
        return out;
    }();
};

// horner() of static coefficients. NEON's fmla overwrites what it adds to, so each coefficient is read anew:
// by an offset from one address, where GCC would compute an address for each.
template <const auto& coefficients, class V>
KL_INLINE V horner(V x) {
    if constexpr (std::is_same_v<V, VF>) {
        const float* at = Splats<coefficients>::values.of[0];
        asm("" : "+r"(at));
        constexpr int n = Splats<coefficients>::n;
        V p = load<V>(at + (n - 1) * lanes<V>);
        for (int i = n - 2; i >= 0; --i) p = mad(p, x, load<V>(at + i * lanes<V>));
        return p;
    } else {
        return horner(coefficients, x);
    }
}
#define KL_HORNER(coefficients, x) horner<coefficients>(x)
#else
#define KL_HORNER(coefficients, x) horner(coefficients, x)
#endif

// Minimax on [-1/2, 1/2].
template <class V>
struct Poly;
template <>
struct Poly<VF> {
    // (2^r - 1) / r so that 1 + r*P is 2^r to 9.2e-8.
    static constexpr double exp2[] = {0.693146978045, 0.240222424012, 0.0555073346366, 0.0096714979858,
                                      0.00132647542076};
    // (2^r - 1) / r itself to 1.1e-8.
    static constexpr double expm1[] = {0.693147187927,   0.24022649795,    0.055503574337,
                                       0.00961823749116, 0.00133907354655, 0.000154035137217};
    // (2^r - 1 - r ln 2) / (r^2 ln 2) to 1.3e-7.
    static constexpr double g[] = {0.346573587181, 0.0800750730506, 0.0138760893312, 0.00193050633483,
                                   0.000222424323718};
    // (atanh(s) - s) / s^3 in s^2, s at most 0.172: its series, to 4e-8.
    static constexpr double atanh[] = {1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11};
};
template <>
struct Poly<VD> {
    static constexpr double exp2[] = {
        0.6931471805599453257,   0.2402265069591013106,    0.05550410866482008801,    0.009618129107594188279,
        0.00133335581467740002,  0.0001540353045703662277, 0.00001525273349343777449, 1.321543531613339281e-6,
        1.017819951861206878e-7, 7.073777938330788397e-9,  4.43477146917858287e-10};
    static constexpr const double (&expm1)[11] = exp2;
    static constexpr double g[] = {
        0.3465735902799726548,    0.08007550231970025808,    0.01387602716620537893,  0.001923625821524041299,
        0.0002222259691076057918, 0.00002200504345621553332, 1.90659172121493627e-6,  1.468384026360645094e-7,
        1.017809723349267798e-8,  6.427141184127395424e-10,  3.706854448848525724e-11};
    static constexpr double atanh[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11, 1.0 / 13,
                                       1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23, 1.0 / 25};
};

// x = n + r with integer n and |r| <= 1/2; scale(p, n) is p * 2^n.
//
// With AVX-512 both are single instructions and right for every x. Elsewhere n is taken from the
// low bits of x + magic, and x must have been clamped to the exponents that the format can hold. (NEON rounds
// and converts in one instruction each, but on fewer of its pipes than it adds on.)
template <class V>
struct Reduced {
    V r, n;

    Reduced() = default;
    KL_INLINE Reduced(V r_, V n_) : r(r_), n(n_) {}
    // Written out: GCC copies a struct of vectors as bytes, by way of the stack, each time round a loop that
    // carries one.
    KL_INLINE Reduced(const Reduced& x) : r(x.r), n(x.n) {}
    KL_INLINE Reduced& operator=(const Reduced& x) {
        r = x.r;
        n = x.n;
        return *this;
    }
};

#if KL_WIDTH == 64
template <class V>
KL_INLINE V clamp_exponent(V x) {
    return x;
}
// r of an infinity is 0, so that 2^-inf is 0.
KL_INLINE Reduced<VF> reduce(VF x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {bits<VF>(_mm512_reduce_ps(bits<__m512>(x), nearest)),
            bits<VF>(_mm512_roundscale_ps(bits<__m512>(x), nearest))};
}
KL_INLINE Reduced<VD> reduce(VD x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {bits<VD>(_mm512_reduce_pd(bits<__m512d>(x), nearest)),
            bits<VD>(_mm512_roundscale_pd(bits<__m512d>(x), nearest))};
}
KL_INLINE VF scale(VF p, Reduced<VF> x) {
    return bits<VF>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(x.n)));
}
KL_INLINE VD scale(VD p, Reduced<VD> x) {
    return bits<VD>(_mm512_scalef_pd(bits<__m512d>(p), bits<__m512d>(x.n)));
}
template <class V>
KL_INLINE V integer(Reduced<V> x) {
    return x.n;
}
// p * factor * 2^n for any finite p and factor.
template <class V>
KL_INLINE V scale_product(V p, V factor, Reduced<V> x) {
    return scale(p * factor, x);
}
template <class V>
KL_INLINE V clamp_for_product(V x) {
    return x;
}
// The smaller of |x| and 1 with the sign of x; 1 for NaN.
KL_INLINE VF within_one(VF x) {
    return bits<VF>(_mm512_range_ps(bits<__m512>(x), bits<__m512>(splat<VF>(1)), 2));
}
KL_INLINE VD within_one(VD x) {
    return bits<VD>(_mm512_range_pd(bits<__m512d>(x), bits<__m512d>(splat<VD>(1)), 2));
}
#else
template <class V>
KL_INLINE V clamp_exponent(V x) {
    using S = typename Traits<V>::Scalar;
    constexpr S limit = Traits<V>::bias - 1;
    return at_most(splat<V>(limit), at_least(splat<V>(-limit + 1), x));
}
template <class V>
KL_INLINE Reduced<V> reduce(V x) {
    V t = x + Traits<V>::round_magic;
    return {x - (t - Traits<V>::round_magic), t};
}
template <class V>
KL_INLINE V scale(V p, Reduced<V> x) {
    using U = typename Traits<V>::Unsigned;
    return bits<V>(bits<U>(p) + (bits<U>(x.n) << Traits<V>::mantissa));
}
template <class V>
KL_INLINE V integer(Reduced<V> x) {
    return x.n - Traits<V>::round_magic;
}
// p * factor * 2^n for any finite p and factor: n in two halves, because p * factor may be 0 or
// subnormal, where adding to the exponent's bits is no scaling, and because half of n is enough to
// leave the format's range.
template <class V>
KL_INLINE V clamp_for_product(V x) {
    using S = typename Traits<V>::Scalar;
    constexpr S limit = 2 * Traits<V>::bias - 4;
    return at_most(splat<V>(limit), at_least(splat<V>(-limit), x));
}
template <class V>
KL_INLINE V scale_product(V p, V factor, Reduced<V> x) {
    using I = Mask<V>;
    const V one = splat<V>(1);
    const I n = bits<I>(x.n) - bits<I>(splat<V>(Traits<V>::round_magic)), half = n >> 1;
    const auto two_to = [&](I m) { return scale(one, Reduced<V>{one, bits<V>(m)}); };
    return p * two_to(half) * factor * two_to(n - half);
}
// A clamped exponent is only ever too high, so nothing above needs holding.
template <class V>
KL_INLINE V within_one(V x) {
    return max(x, splat<V>(-1));
}
#endif

// The smaller of |x| and `most` with the sign of x, and `most` for NaN.
KL_INLINE VF within(VF x, VF most) {
#if KL_WIDTH == 64
    return bits<VF>(_mm512_range_ps(bits<__m512>(x), bits<__m512>(most), 2));
#else
    return max(min(x, most), -most);
#endif
}

// c 2^n for any finite c, and a 2^n that the format holds.
template <class V>
KL_INLINE V scaled(V c, Reduced<V> x) {
#if KL_WIDTH == 64
    return scale(c, x);
#else
    return scale(splat<V>(1), x) * c;
#endif
}

// 2^r for |r| <= 1/2.  fp32: 2.5 ulp.
template <class V>
KL_INLINE V exp2_fraction(V r) {
    return mad(KL_HORNER(Poly<V>::exp2, r), r, splat<V>(1));
}

// 2^x.  fp32: 2.5 ulp on [-125, 126]; below it under 2^-124 and in the end 0, above it over 2^125;
// NaN gives NaN with AVX-512 and anything elsewhere. e is the reduction of what clamp_exponent leaves of x.
template <class V>
KL_INLINE V exp2_from([[maybe_unused]] V x, Reduced<V> e) {
    const V y = scale(exp2_fraction(e.r), e);
#if KL_WIDTH == 64
    return y;
#else
    // What the clamp leaves of a weight that is nothing must not count where it meets an x of 1e38.
    return bits<V>(bits<Mask<V> >(y) & Mask<V>(x >= splat<V>(-Traits<V>::bias + 2)));
#endif
}
template <class V>
KL_INLINE V exp2(V x) {
    return exp2_from(x, reduce(clamp_exponent(x)));
}

// factor * 2^x for any finite factor and product, the factor known long before x.  fp32: 3.5 ulp where the
// product is normal; x is what clamp_for_product leaves of it.
template <class V>
class Multiple {
    using S = typename Traits<V>::Scalar;

public:
#if KL_WIDTH == 64
    explicit Multiple(double factor) {
        coefficients_[0] = splat<V>(static_cast<S>(factor));
        for (int i = 1; i < kTerms; ++i)
            coefficients_[i] = splat<V>(static_cast<S>(factor * Poly<V>::exp2[i - 1]));
    }
    KL_INLINE V of_exp2(Reduced<V> x) const { return scale(horner(coefficients_, x.r), x); }

private:
    static constexpr int kTerms = 1 + sizeof(Poly<V>::exp2) / sizeof(double);
    V coefficients_[kTerms];
#else
    explicit Multiple(double factor) : factor_(splat<V>(static_cast<S>(factor))) {}
    KL_INLINE V of_exp2(Reduced<V> x) const { return scale_product(exp2_fraction(x.r), factor_, x); }

private:
    V factor_;
#endif
};

// x = n + r again, with 2^n beside it.
template <class V>
struct Split {
    V r, n, two_n;
};
template <class V>
KL_INLINE Split<V> split(V x, V one) {
    const Reduced<V> e = reduce(x);
    return {e.r, integer(e), scale(one, e)};
}

// (2^x - 1 - x ln 2) / ln 2, which is never negative.  fp32: 8 ulp for finite x up to 126, and over
// 2^125 for larger ones; x is what g2_domain leaves of it, and e its reduction.
template <class V>
KL_INLINE V g2_domain(V x) {
#if KL_WIDTH < 64
    using S = typename Traits<V>::Scalar;
    x = at_most(splat<V>(static_cast<S>(Traits<V>::bias - 1)), x);
#endif
    return x;
}
template <class V>
KL_INLINE V g2_from(V x, Reduced<V> e) {
    using S = typename Traits<V>::Scalar;
    const V log2e = splat<V>(static_cast<S>(kLog2e)), two_n = scale(splat<V>(1), e);
    // In this order the large terms meet first and leave without a rounding. Where x rounds to n = 0 the
    // terms beside the polynomial vanish exactly, so no blend is needed.
    const V linear = two_n * e.r, rest = linear + mad(two_n, log2e, -log2e) - x;
    return mad(linear, e.r * KL_HORNER(Poly<V>::g, e.r), rest);
}
template <class V>
KL_INLINE V g2(V x) {
    x = g2_domain(x);
    return g2_from(x, reduce(clamp_exponent(x)));
}

// 2^x; g2(x); and 2^x g2(-x) = (1 - 2^x + x ln 2 2^x) / ln 2, never negative either.  fp32, on [-126, 126]:
// 2.5, 8 and 20 ulp; above it over 2^125.
template <class V>
struct BothWays {
    V power, g, h;
};
template <class V>
KL_INLINE BothWays<V> both_ways(V x) {
    using S = typename Traits<V>::Scalar;
    const V log2e = splat<V>(static_cast<S>(kLog2e)), ln2 = splat<V>(static_cast<S>(kLn2));
#if KL_WIDTH < 64
    x = at_most(splat<V>(static_cast<S>(Traits<V>::bias - 1)), x);
#endif
    const Reduced<V> e = reduce(clamp_exponent(x));
    const V n = integer(e), two_n = scale(splat<V>(1), e);
    // 2^r = 1 + ln 2 f, f = r + r^2 P. Where n is 0, what stands beside r^2 P vanishes exactly, as in g2.
    const V rp = e.r * KL_HORNER(Poly<V>::g, e.r), r2p = e.r * rp, f = mad(e.r, rp, e.r);
    const V rest = mad(two_n, e.r, mad(two_n, log2e, -log2e)) - x;
    const V h = mad(two_n, mad(f, x * ln2, -r2p), mad(two_n, n - log2e, log2e));
    return {mad(two_n * ln2, f, two_n), mad(two_n, r2p, rest), h};
}

// sign * (2^r two_n - 1), sign being 1 or -1 and already in two_n.
template <class V>
KL_INLINE V exp2m1_split(V r, V two_n, V sign) {
    return mad(two_n, r * KL_HORNER(Poly<V>::expm1, r), two_n - sign);
}

// 2^x - 1.  fp32: 3 ulp up to 126.
template <class V>
KL_INLINE V exp2m1(V x) {
    const V one = splat<V>(1);
    const Split<V> e = split(at_least(splat<V>(-100), x), one);
    return exp2m1_split(e.r, e.two_n, one);
}

// 2^x and 2^x - 1, each with a relative accuracy of its own.  fp32: 1.5 and 3 ulp on [-120, 120], where x
// is held.
template <class V>
struct Exponential {
    V whole, less_one;
};
template <class V>
KL_INLINE Exponential<V> exponential(V x) {
    using S = typename Traits<V>::Scalar;
    constexpr S limit = Traits<V>::bias - 7;
    const V one = splat<V>(1);
    const Split<V> e = split(min(max(x, splat<V>(-limit)), splat<V>(limit)), one);
    const V fraction = e.r * KL_HORNER(Poly<V>::expm1, e.r);
    return {mad(e.two_n, fraction, e.two_n), mad(e.two_n, fraction, e.two_n - one)};
}

// log(1 + z), and z - log(1 + z) >= 0, from z and from y = 1 + z: the one counts where it is near 0, the
// other where z is near -1, so each must have a relative accuracy of its own. y is normal and finite.
// fp32: 2.5 ulp and, for z >= -1/4, 10 ulp of what z and y stand for.
template <class V>
struct Logarithm {
    V log, gap;
};
template <class V>
KL_INLINE Logarithm<V> log_one_plus(V z, V y) {
    using S = typename Traits<V>::Scalar;
    using I = Mask<V>;
    constexpr int mantissa = Traits<V>::mantissa;
    // y = 2^n f with f in [sqrt(1/2), sqrt 2): where n = 0, f - 1 is z.
    const I n = (bits<I>(y) - bits<I>(splat<V>(static_cast<S>(0.70710678118654752440)))) >> mantissa;
    const V f = bits<V>(bits<I>(y) - (n << mantissa)), magic = splat<V>(Traits<V>::round_magic);
    const V units = bits<V>(bits<I>(magic) + n) - magic;
    const I near = n == I{};
    const V x = near ? z : f - splat<V>(1);
    // log(1 + x) = 2 atanh s = 2 s + t, and x - 2 s = x s.
    const V s = x / (splat<V>(2) + x), s2 = s * s, t = (s + s) * s2 * KL_HORNER(Poly<V>::atanh, s2);
    const V log = mad(units, splat<V>(static_cast<S>(kLn2)), mad(splat<V>(2), s, t));
    return {log, near ? mad(x, s, -t) : z - log};
}

// The rounding error of hi = x - y (Knuth): x - y == hi + error, exactly.
template <class V>
KL_INLINE V difference_error(V x, V y, V hi) {
    V t = hi - x;
    return (x - (hi - t)) - (y + t);
}

}  // namespace kl::KL_ISA
