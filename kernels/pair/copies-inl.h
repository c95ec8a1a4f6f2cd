// Rows by way of copies of a few columns: sides of two formats, and arithmetic in fp64.
#pragma once

#include <cmath>

#include "pair/row.h"
#include "simd/formats-inl.h"

namespace kl::KL_ISA {

template <class T>
KL_INLINE const T* at(const void* row, std::int64_t column) {
    return static_cast<const T*>(row) + column;
}

// A finite logit stays finite, and so does the difference of two: below a temperature of 1 the lowest fp64
// number would become -inf, a column that does not exist.
KL_INLINE VD scaled(VD logit, double scale) {
    const VD inf = splat<VD>(__builtin_inf()), most = splat<VD>(kLargestProduct);
    const VD product = logit * splat<VD>(scale);
    return abs(logit) < inf ? max(min(product, most), -most) : product;
}

// Calls take(a, b, i, n, scale) with copies in R of n columns from the i-th on: for sides of two formats, and
// for fp64 arithmetic, whose copies are scaled already.
template <class R, class Take>
inline void for_each_copy(const Row& row, std::int64_t first, std::int64_t last, Take take) {
    constexpr bool wide = std::is_same_v<R, double>;
    R a[kScratchColumns] = {}, b[kScratchColumns] = {};
    for (std::int64_t i = first; i < last; i += kScratchColumns) {
        const std::int64_t n = last - i < kScratchColumns ? last - i : kScratchColumns;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        if constexpr (wide) {
            for (std::int64_t j = 0; j < n; j += lanes<VD>) {
                store(a + j, scaled(load<VD>(a + j), row.scale_a()));
                store(b + j, scaled(load<VD>(b + j), row.scale_b()));
            }
        }
        take(a, b, i, n, wide ? 1.0 : row.exact_scale());
    }
}

// Writes x to columns [first, last) of a gradient that may be missing.
inline void fill(Destination to, std::int64_t first, std::int64_t last, double x) {
    if (to.data == nullptr) return;
    in_format(to.dtype, [&]<class T>() {
        T rounded;
        round_one(x, rounded);
        for (std::int64_t i = first; i < last; ++i) static_cast<T*>(to.data)[i] = rounded;
    });
}

}  // namespace kl::KL_ISA
