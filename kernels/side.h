// One side of a row by itself, in fp64 from its own maximum: for rows that the fast sweep of both sides
// cannot do, one of which may have no distribution where the other has.
#pragma once

#include "elementary.h"
#include "formats.h"
#include "row.h"

namespace kl::KL_ISA {

inline SideResult side_result(const void* logits, Dtype dtype, std::int64_t columns, double scale) {
    const VD inf = splat<VD>(__builtin_inf()), zero{}, deepest = splat<VD>(-1020);
    double x[kScratchColumns];
    // Calls take(vector, column) for what is left of a run; the filling behind the last column is -inf.
    const auto for_each = [&](auto take) {
        for (std::int64_t i = 0; i < columns; i += kScratchColumns) {
            std::int64_t n = columns - i < kScratchColumns ? columns - i : kScratchColumns;
            widen_run(logits, dtype, i, n, x);
            for (; n % lanes<VD> != 0; ++n) x[n] = minus_infinity<double>();
            for (std::int64_t j = 0; j < n; j += lanes<VD>) take(load<VD>(x + j), i + j);
        }
    };

    VD top = -inf;
    VL bad{};
    for_each([&](VD v, std::int64_t) {
        bad |= ~(v < inf);
        top = max(v, top);
    });
    SideResult out;
    const double most = largest(top);
    if (any<VD>(bad) || !(most > -__builtin_inf())) return out;
    const double m = most * scale;

    VD z{}, e{};
    for_each([&](VD v, std::int64_t column) {
        const VD u = v * scale - m, w_ = exp2(max(u, deepest));
        const VL none = v == -inf;
        const VD w = none ? zero : w_;
        z += w;
        e += none ? zero : w * u;
        if (out.top < 0 && any<VD>(v == splat<VD>(most)))
            for (int i = lanes<VD> - 1; i >= 0; --i)
                if (v[i] == most) out.top = column + i;
    });
    const double total = sum(z), log_z = std::log2(total), entropy = kLn2 * (log_z - sum(e) / total);
    out.m = m;
    out.log_z = log_z;
    out.entropy = entropy > 0 ? entropy : 0;
    return out;
}

}  // namespace kl::KL_ISA
