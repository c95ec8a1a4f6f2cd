// One side of a row by itself, measured from its own maximum: for rows that the sweep of both sides cannot
// do, of which one side may have no distribution while the other has.
#pragma once

#include <cmath>

#include "simd/elementary-inl.h"
#include "simd/formats-inl.h"
#include "token_stats/state.h"
#include "simd/pipeline-inl.h"

namespace kl::KL_ISA {

// In R, float or double. The caller checks m: in fp32 a large one leaves exponents no digits.
template <class R>
inline SideResult side_as(const void* logits, Dtype dtype, std::int64_t columns, double scale) {
    using V = Wide<R>;
    constexpr R infinity = static_cast<R>(__builtin_inf());
    const V inf = splat<V>(infinity), zero{};
    R x[kScratchColumns];
    // Calls run(columns of a run, its first column); behind the last column -inf fills up a vector.
    const auto for_each_run = [&](auto run) {
        for (std::int64_t i = 0; i < columns; i += kScratchColumns) {
            std::int64_t n = columns - i < kScratchColumns ? columns - i : kScratchColumns;
            widen_run(logits, dtype, i, n, x);
            for (; n % lanes<V> != 0; ++n) x[n] = -infinity;
            run(n, i);
        }
    };

    R most = -infinity;
    std::int64_t first = 0;  // of the run that holds it first
    Mask<V> bad{};
    for_each_run([&](std::int64_t n, std::int64_t column) {
        V top = -inf;
        for (std::int64_t j = 0; j < n; j += lanes<V>) {
            const V v = load<V>(x + j);
            bad |= ~(v < inf);
            top = max(v, top);
        }
        if (largest(top) > most) {
            most = largest(top);
            first = column;
        }
    });
    SideResult out;
    if (any<V>(bad) || !(most > -infinity)) return out;

    const R m = static_cast<R>(static_cast<double>(most) * scale);
    const V k = splat<V>(static_cast<R>(scale)), below = splat<V>(-m), deepest = splat<V>(-1000);
    const V peak = splat<V>(most);
    const auto exponent = [&](V v) KL_INLINE_LAMBDA {
        // In fp64 logits may be so large that the rounding of m shows beside a product that is not rounded.
        if constexpr (sizeof(R) == sizeof(double)) return (v - peak) * k;
        return fma(v, k, below);
    };
    double total = 0, weighted = 0;
    for_each_run([&](std::int64_t n, std::int64_t column) {
        V z{}, e{}, run_z{}, run_e{};
        for (std::int64_t j = 0; j < n; j += lanes<V>) {
            const V v = load<V>(x + j), u = max(exponent(v == -inf ? zero : v), deepest);
            const V w_ = exp2(u), w = v == -inf ? zero : w_;
            run_z += w;
            run_e += w * u;
            if (j % (kRun * lanes<V>) == 0) [[unlikely]] {
                z += run_z;
                e += run_e;
                run_z = run_e = V{};
            }
        }
        z += run_z;
        e += run_e;
        total += sum(z);
        weighted += sum(e);
        if (column == first)
            for (std::int64_t j = n - 1; j >= 0; --j)
                if (x[j] == most) out.top = column + j;
    });
    const double log_z = std::log2(total), entropy = kLn2 * (log_z - weighted / total);
    out.m = static_cast<double>(m);
    out.log_z = log_z;
    out.entropy = entropy > 0 ? entropy : 0;
    return out;
}

SideResult side_result(const void* logits, Dtype dtype, std::int64_t columns, double scale) {
    // A factor that is no fp32 belongs to two temperatures, which are computed in fp64 throughout.
    if (dtype != Dtype::f64 && static_cast<double>(static_cast<float>(scale)) == scale) {
        const SideResult out = side_as<float>(logits, dtype, columns, scale);
        if (!(std::fabs(out.m) > 0x1p13)) return out;
    }
    return side_as<double>(logits, dtype, columns, scale);
}

}  // namespace kl::KL_ISA
