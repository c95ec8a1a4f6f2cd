// The columns of a LabelTerm: factor q, and at the label factor (q - 1).
#pragma once

#include <cmath>

#include "pair/row.h"
#include "pair/row_constants-inl.h"
#include "simd/elementary-inl.h"
#include "simd/formats-inl.h"

namespace kl::KL_ISA {

// Past 2^20 two fp32 do not hold an lse to the precision that its subtraction needs.
inline bool fits_fp32(const LabelTerm& label) {
    return std::fabs(label.lse) < 0x1p20 && !is_odd(label.factor);
}

template <class V>
struct LabelColumns {
    using S = typename Traits<V>::Scalar;

    V k, k_lo, lowest;
    Offset<V> lse;
    Multiple<V> q;

    LabelColumns(double scale, const LabelTerm& label)
        : k(splat<V>(static_cast<S>(scale))),
          k_lo(splat<V>(static_cast<S>(scale - static_cast<double>(static_cast<S>(scale))))),
          lowest(splat<V>(static_cast<S>((label.lse - 240) / scale))),
          lse(label.lse, 0),
          q(label.factor * std::exp2(-static_cast<double>(lse.lo[0]))) {}

    KL_INLINE Reduced<V> begin(V x) const {
        x = max(x, lowest);
        Reduced<V> e = reduce(fma(x, k, -lse.hi));
        e.r = fma(x, k_lo, fma(x, k, -(lse.hi + integer(e))));
        return e;
    }
    KL_INLINE V end(const Reduced<V>& e) const { return q.of_exp2(e); }

    // To the gradients of n columns from the i-th on; x may be read and written up to a whole vector.
    void add(const S* x, std::int64_t n, S* to, const LabelTerm& label, std::int64_t i) const {
        const std::int64_t at = label.column - i;
        const bool here = at >= 0 && at < n;
        const S without = here ? to[at] : 0;
        for (std::int64_t j = 0; j < n; j += lanes<V>)
            store(to + j, load<V>(to + j) + end(begin(load<V>(x + j))));
        if (here) to[at] = without + static_cast<S>(label.at_label);
    }
};

}  // namespace kl::KL_ISA
