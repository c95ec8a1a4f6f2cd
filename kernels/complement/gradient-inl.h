// The gradients of the log-sum-exp and of the entropy of the columns that are not picked.
#pragma once

#include "complement/complement.h"
#include "pair/gradient_loop-inl.h"

namespace kl::KL_ISA {

// pi (grad_rest_lse - grad_rest_entropy (log pi + entropy)), pi = 2^(k x - lse).
template <bool WithEntropy, class V>
struct RestGradient {
    using S = typename Traits<V>::Scalar;

    RowConstants<V> row;
    V flow, grad_log_pi;              // of log2 pi
    V begun_flow, begun_grad_log_pi;  // of log2 pi + lse.lo, times 2^-lse.lo

    static RowScalars as_row(const ComplementScalars& s) {
        RowScalars row{};
        row.lse_a = row.lse_b = s.lse;
        row.coefficient_a = row.coefficient_b = 1;
        return row;
    }

    RestGradient(double scale, const ComplementScalars& s) : row(scale, as_row(s)) {
        const double to_pi = s.grad_rest_lse - s.grad_rest_entropy * s.entropy,
                     to_log = -s.grad_rest_entropy * kLn2;
        const auto lo = static_cast<double>(row.lse_a.lo[0]), rest = std::exp2(-lo);
        flow = splat<V>(static_cast<S>(to_pi));
        grad_log_pi = splat<V>(static_cast<S>(to_log));
        begun_flow = splat<V>(static_cast<S>((to_pi - lo * to_log) * rest));
        begun_grad_log_pi = splat<V>(static_cast<S>(to_log * rest));
    }

    // Whether the loop can be pipelined: 2^-lse.lo must be a factor near 1.
    bool can_be_pipelined() const { return std::fabs(row.lse_a.lo[0]) < 1; }

    template <bool ToA, bool ToB>
    KL_INLINE Gradients<V> at(V, V x) const {
        V factor = flow;
        if constexpr (WithEntropy) {
            // Clamped: -inf times a pi of 0 would be NaN.
            const V log_pi = product_less(x, row, row.lse_a, V{});
            factor = mad(max(log_pi, splat<V>(-static_cast<S>(0x1p60))), grad_log_pi, flow);
        }
        return {V{}, power(x, row, row.lse_a, factor)};
    }
};

// The same for a pipelined loop, in fp32.
template <bool WithEntropy>
struct PipelinedRestGradient {
    RestGradient<WithEntropy, VF> of;

    template <bool ToA, bool ToB>
    KL_INLINE Begun<VF> begin(VF, VF x) const {
        Begun<VF> out;
        x = max(x, of.row.lowest_a);
        begin_power(x, of.row, out);
        if constexpr (WithEntropy) out.r = fma(x, of.row.k_lo, out.r);
        return out;
    }
    template <bool ToA, bool ToB>
    KL_INLINE Gradients<VF> end(const Begun<VF>& x) const {
        const VF factor = WithEntropy ? mad(x.r, of.begun_grad_log_pi, of.begun_flow) : of.begun_flow;
        return {VF{}, scale_product(exp2_fraction(x.log_p.r), factor, x.log_p)};
    }
};

template <bool WithEntropy, class T>
void gradient_with(const T* x, std::int64_t n, double scale, const ComplementScalars& s, T* to,
                   bool non_temporal) {
    const RestGradient<WithEntropy, Wide<T>> gradient(scale, s);
    T* const nowhere = nullptr;
    if constexpr (!std::is_same_v<T, double>) {
        if (gradient.can_be_pipelined()) {
            const PipelinedRestGradient<WithEntropy> pipelined_gradient{gradient};
            return gradient_span<false, true>(x, x, n, pipelined_gradient, nowhere, to, non_temporal);
        }
    }
    gradient_span<false, true>(x, x, n, gradient, nowhere, to, non_temporal);
}

template <class T>
void gradient_run(const T* x, std::int64_t n, double scale, const ComplementScalars& s, T* to,
                  bool non_temporal) {
    if (s.grad_rest_entropy != 0)
        gradient_with<true>(x, n, scale, s, to, non_temporal);
    else
        gradient_with<false>(x, n, scale, s, to, non_temporal);
}

}  // namespace kl::KL_ISA
