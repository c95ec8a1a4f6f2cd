// The gradient of b as q - p, two exponentials.
//
// It takes two thirds of the operations of p (e^r - 1), errs by as small a part of the larger of the two, and
// asks nothing of r: neither -inf nor a q far above p is an exception. It lacks relative precision in
// columns where p and q nearly agree. Where they agree in the whole row, those columns are the gradient, and
// may_take_difference() says no; elsewhere the row's other columns outweigh them.
#pragma once

#include <cmath>

#include "simd/elementary-inl.h"
#include "pair/row.h"
#include "pair/row_constants-inl.h"

namespace kl::KL_ISA {

// A divergence in nats with which r is typically 0.04: the row's gradient keeps five digits. Triton's kernels
// have the same.
constexpr double kApart = 1e-3;

// Where one side lacks a column that the other has, the other forms would take several times as long.
inline bool may_take_difference(const RowScalars& row) {
    return row.divergence > (row.row_class == RowClass::neg_inf ? 0 : kApart) &&
           std::fabs(row.lse_a) < 0x1p20 && std::fabs(row.lse_b) < 0x1p20 && !is_odd(row.coefficient_b);
}

// Whether errors of r as large as its own rounding stay below a's bound, which grows with D.
inline bool may_take_far(const RowScalars& row) {
    return may_take_difference(row) && row.divergence > 1 && row.divergence < 0x1p127 &&
           std::fabs(row.shift) < 4 * row.divergence && !is_odd(row.coefficient_a);
}

template <bool WithLow, class V>
struct Difference {
    RowConstants<V> row;
    Multiple<V> p, q;

    struct Begun {
        Reduced<V> p, q;
    };

    // more_q: what is added to q's factor alone.
    Difference(double scale, const RowScalars& scalars, double more_q = 0)
        : row(scale, scalars, WithLow),
          p(scalars.coefficient_b * rest_of(row.lse_a)),
          q((scalars.coefficient_b + more_q) * rest_of(row.lse_b)) {}

    template <bool ToA, bool ToB>
    KL_INLINE Begun begin(V a, V b) const {
        return {reduced_product<WithLow>(max(a, row.lowest_a), row, row.lse_a),
                reduced_product<WithLow>(max(b, row.lowest_b), row, row.lse_b)};
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> end(const Begun& x) const {
        return {V{}, q.of_exp2(x.q) - p.of_exp2(x.p)};
    }

private:
    static double rest_of(const Offset<V>& offset) { return std::exp2(-static_cast<double>(offset.lo[0])); }
};

}  // namespace kl::KL_ISA
