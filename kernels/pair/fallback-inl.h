// A row in fp64, measured from the true maxima of both sides: for fp64 logits, for two temperatures, and for
// the rare row whose result the fast path may have lost to cancellation. It reads the row three times.
#pragma once

#include <cmath>

#include "isa/entries-inl.h"
#include "simd/elementary-inl.h"
#include "pair/copies-inl.h"
#include "pair/state.h"

namespace kl::KL_ISA {

// Calls take(a, b, padding) with vectors in fp64, in units of ln 2; the padding of the last is -inf.
template <class Take>
inline void for_each_wide(const Row& row, Take take) {
    for_each_copy<double>(row, 0, row.columns,
                          [&](double* a, double* b, std::int64_t, std::int64_t n, double) {
                              std::int64_t padding = 0;
                              for (; n % lanes<VD> != 0; ++n, ++padding)
                                  a[n] = b[n] = minus_infinity<double>();
                              for (std::int64_t j = 0; j < n; j += lanes<VD>)
                                  take(load<VD>(a + j), load<VD>(b + j), j + lanes<VD> == n ? padding : 0);
                          });
}

RowResult fallback(const Row& row) {
    const VD inf = splat<VD>(__builtin_inf()), zero{}, deepest = splat<VD>(-1020);
    VD top_a = -inf, top_b = -inf, reach = zero;
    VL bad{}, infinite{}, neg_inf{};
    std::int64_t padded = 0;
    for_each_wide(row, [&](VD a, VD b, std::int64_t padding) {
        bad |= ~((a < inf) & (b < inf));
        infinite |= ~(a == -inf) & (b == -inf);
        neg_inf -= (a == -inf) | (b == -inf);
        padded += padding;
        top_a = max(a, top_a);
        top_b = max(b, top_b);
        reach = max(abs(a == -inf ? zero : a), max(abs(b == -inf ? zero : b), reach));
    });
    const double m_a = largest(top_a), m_b = largest(top_b);
    if (any<VD>(bad) || !(m_a > -__builtin_inf()) || !(m_b > -__builtin_inf())) return nan_result();

    // From here on each side counts from its own maximum, so that nothing below mixes large numbers.
    VD z_a{}, z_b{}, sum_d{};
    for_each_wide(row, [&](VD a, VD b, std::int64_t) {
        const VD u = a - m_a, v = b - m_b;
        const VD w = exp2(max(u, deepest)), w_b = exp2(max(v, deepest));
        const VL no_a = a == -inf, no_b = b == -inf;
        z_a += no_a ? zero : w;
        z_b += no_b ? zero : w_b;
        // A weight this small is none: its difference may be 2^1022.
        sum_d += (no_a | no_b | (u < deepest)) ? zero : w * (v - u);
    });
    RowResult out;
    const double z = sum(z_a), c = sum(sum_d) / z, gap = std::log2(sum(z_b)) - std::log2(z);
    out.lse_a = m_a + std::log2(z);
    out.lse_b = m_b + std::log2(sum(z_b));
    out.shift = m_b - m_a + gap;
    std::int64_t missing = -padded;
    for (int i = 0; i < lanes<VD>; ++i) missing += neg_inf[i];
    if (missing > 0 || largest(reach) > 0x1p60) out.row_class = RowClass::neg_inf;
    if (any<VD>(infinite)) {
        out.divergence = __builtin_inf();
        out.row_class = RowClass::infinite;
        return out;
    }
    out.divergence = (gap - c) * kLn2;
    if (out.divergence > 1e-3) return out;

    // Nearly equal sides: the same quantity as a sum of non-negative terms.
    VD a1{}, a2{};
    for_each_wide(row, [&](VD a, VD b, std::int64_t) {
        const VL no_a = a == -inf, no_b = b == -inf;
        const VD u = a - m_a, v = b - m_b, far = splat<VD>(32), x = (no_a | no_b) ? zero : (v - u) - c;
        const VD w_ = exp2(max(u, deepest)), w_b_ = exp2(max(v - c, deepest));
        const VD w = (no_a | (u < deepest)) ? zero : w_, w_b = no_b ? zero : w_b_;
        const VD wg = x > far ? (w_b - w) * kLog2e - w * x : w * g2(min(x, far));
        a2 += no_a ? w_b * kLog2e : wg;
        a1 += w * x;
    });
    const double mean_x = kLn2 * sum(a1) / z, mean_g = kLn2 * sum(a2) / z;
    out.divergence = divergence_from(mean_x, mean_g);
    out.shift = m_b - m_a + (c + std::log1p(mean_x + mean_g) * kLog2e);
    return out;
}

}  // namespace kl::KL_ISA
