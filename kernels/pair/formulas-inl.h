// The formulas of the divergences beside KL(a||b), for the sweeps of formula_pass-inl.h.
//
// Where D is no sum of terms, `Sums` names the formula whose sums over a row D is made of (divergence.cpp),
// and beta is the row's own in the flows. A formula gives, for one column, a term >= 0 of the divergence's
// sum and the two flows of its gradient, a dD/da and b dD/db up to multiples of a and of b:
//     D = sum term,   dD/d(logits of a) = flow_a - a sum flow_a,   and so for b.
// Nothing cancels in a term: it is of second order where a and b nearly agree (docs/numerics.md).
#pragma once

#include "simd/elementary-inl.h"
#include "pair/row.h"

namespace kl::KL_ISA {

// One column: probabilities, r = log b - log a, and the two shares of the mixture m = beta a + w b. A side
// without mass here has probability 0 and an r that is as large as the format bears; without either, r = 0.
template <class V>
struct Column {
    V a, b;
    V r2, r;  // in units of ln 2 and in nats
    V beta, w;

    KL_INLINE Column exchanged() const { return {b, a, -r2, -r, w, beta}; }
};

template <class V>
struct Terms {
    V term, flow_a, flow_b;
};

template <class V>
KL_INLINE V constant(double x) {
    return splat<V>(static_cast<typename Traits<V>::Scalar>(x));
}

// Past this r2, b - a is b but for its last bits, while a e^r may be 0 times inf.
constexpr double kFarR = 30;

// b - a, precise where the two nearly agree.
template <class V>
KL_INLINE V difference(const Column<V>& c) {
    return with_sign((c.r2 > V{} ? c.b : c.a) * -exp2m1(-abs(c.r2)), c.r2);
}

// 1/2 where b is the larger, -1/2 where a is, 0 where they are equal.
template <class V>
KL_INLINE V half_sign(const Column<V>& c) {
    return c.r2 == V{} ? V{} : with_sign(constant<V>(0.5), c.r2);
}

// A term of KL(a||b): a (e^r - 1 - r).
template <class V>
KL_INLINE V kl_term(const Column<V>& c) {
    const V far = constant<V>(kFarR), near = c.a * g2(min(far, c.r2)) * constant<V>(kLn2);
    return c.r2 > far ? c.b - c.a - c.a * c.r : near;
}

// KL(a||m): its term a (z - u), u = log m - log a and n = 1 - a/m, for z = m/a - 1 = w (e^r - 1).
template <class V>
struct Mixed {
    V term, u, n;
};
template <class V>
KL_INLINE Mixed<V> mixed(const Column<V>& c) {
    const Exponential<V> e = exponential(c.r2);
    const V z = c.w * e.less_one, y = mad(c.w, e.whole, c.beta);
    const Logarithm<V> l = log_one_plus(z, y);
    return {c.r2 > constant<V>(kFarR) ? c.w * (c.b - c.a) - c.a * l.log : c.a * l.gap, l.log, z / y};
}

// Named as Formula has them.
namespace formulas {

struct jeffreys {
    using Sums = jeffreys;
    static constexpr bool infinite_where_one_is_missing = true;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const V d = difference(c);
        return {c.w * kl_term(c) + c.beta * kl_term(c.exchanged()), -c.w * c.a * c.r - c.beta * d,
                c.w * d + c.beta * c.b * c.r};
    }
};

struct js {
    using Sums = js;
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const Mixed<V> a = mixed(c), b = mixed(c.exchanged());
        return {c.beta * a.term + c.w * b.term, -c.beta * c.a * a.u, -c.w * c.b * b.u};
    }
};

struct skew {
    using Sums = skew;
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const Mixed<V> m = mixed(c);
        return {m.term, c.a * (c.beta * m.n - m.u), c.w * c.b * m.n};
    }
};

struct tv {
    using Sums = tv;
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const V half = half_sign(c);
        return {abs(difference(c)) * constant<V>(0.5), -half * c.a, half * c.b};
    }
};

// tv's terms, and alpha = sum min(a, b) in two halves, of a and of b where each is the smaller.
struct overlap {
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const V half = constant<V>(0.5), sign = half_sign(c);
        return {abs(difference(c)) * half, c.a * (half + sign), c.b * (half - sign)};
    }
};

struct nla {
    using Sums = overlap;
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const Terms<V> t = overlap::at(c);
        const V scale = constant<V>(kNlaScale);
        // Up first: neither a probability of 2^-100 nor one of 1 leaves what fp32 holds this way.
        return {V{}, t.flow_a * scale * c.beta, t.flow_b * scale * c.beta};
    }
};

struct lk {
    using Sums = tv;
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const V of_tv = c.w * half_sign(c);
        return {V{}, -c.a * mad(c.beta, c.r, of_tv), mad(c.beta, difference(c), of_tv * c.b)};
    }
};

// The term of js at 1/2, that of tv, and min(a, b). With x = min/max and t = (1 - x)/(1 + x) the first is
// max/2 ((1 + x) log(2/(1 + x)) + x log x), which is max/2 (1 + x) sum t^2k / (2k (2k - 1)).
struct comparison {
    static constexpr bool infinite_where_one_is_missing = false;
    template <class V>
    KL_INLINE static Terms<V> at(const Column<V>& c) {
        const V half = constant<V>(0.5), one = constant<V>(1), zero{};
        const V larger = c.r2 > zero ? c.b : c.a, smaller = c.r2 > zero ? c.a : c.b;
        const Exponential<V> x = exponential(-abs(c.r2));
        const V tv = -half * larger * x.less_one;
        if constexpr (std::is_same_v<V, VD>) {
            return {js::at(Column<V>{c.a, c.b, c.r2, c.r, half, half}).term, tv, smaller};
        } else {
            const V y = one + x.whole, t = x.less_one / y, t2 = t * t;
            const V far = mad(y, constant<V>(kLn2) - log_one_plus(x.whole, y).log, -x.whole * abs(c.r));
            return {half * larger * (t2 < constant<V>(0.25) ? y * t2 * horner(kSeries, t2) : far), tv,
                    smaller};
        }
    }

private:
    // The relative error is 1.2e-7 at t = 1/2.
    static constexpr double kSeries[] = {1.0 / 2,  1.0 / 12,  1.0 / 30,  1.0 / 56,
                                         1.0 / 90, 1.0 / 132, 1.0 / 182, 1.0 / 240};
};

}  // namespace formulas

// Calls call<F>() for the struct F of a formula. KL(a||b) has none: its sweeps are its own. Nor has what only
// sums ask for.
template <class Call>
inline auto with_formula(Formula formula, Call call) {
    switch (formula) {
#define X(name)         \
    case Formula::name: \
        return call.template operator()<formulas::name>();
        KL_FORMULAS(X)
#undef X
        case Formula::kl:
        case Formula::comparison:
            break;
    }
    __builtin_trap();
}

}  // namespace kl::KL_ISA
