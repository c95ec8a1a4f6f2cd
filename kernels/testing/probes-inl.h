// For tests and benches: elementary functions, and loops that do nothing but read and write.
#pragma once

#include "simd/elementary-inl.h"
#include "simd/formats-inl.h"

namespace kl::KL_ISA {

// To memory as a T, and back.
template <class T>
inline VF stored(VF x) {
    T kept[kStep<T>];
    store_pair(std::false_type{}, kept, Pair<VF>{x, x});
    const auto back = load_pair(kept);
    return back.x == back.y ? back.y : splat<VF>(__builtin_nanf(""));
}

inline VF elementary_function(int which, VF x) {
    const VF one = splat<VF>(1);
    const Exponential<VF> e = exponential(x);
    const Logarithm<VF> of_1_plus_x = log_one_plus(x, one + x), of_x = log_one_plus(x - one, x);
    const BothWays<VF> both = both_ways(x);
    const VF third = Multiple<VF>(1.0 / 3).of_exp2(reduce(clamp_for_product(x)));
    const VF all[] = {exp2(x),  g2(x),      exp2m1(x), e.whole, e.less_one, of_1_plus_x.log, of_1_plus_x.gap,
                      of_x.log, both.power, both.g,    both.h,  third,      stored<Bf16>(x), stored<F16>(x)};
    return all[which];
}

inline void elementary(int which, const float* x, float* y, std::int64_t n) {
    for (std::int64_t i = 0; i + lanes<VF> <= n; i += lanes<VF>)
        store(y + i, elementary_function(which, load<VF>(x + i)));
}

constexpr std::int64_t kProbeStep = 4 * kWidth, kProbeAhead = 4096;

KL_INLINE void prefetch_probe(const char* p) {
    for (std::int64_t line = 0; line < kProbeStep; line += 64) __builtin_prefetch(p + kProbeAhead + line);
}

inline std::uint64_t probe_read(const char* a, const char* b, std::int64_t bytes) {
    VU sums[4] = {};
    for (std::int64_t i = 0; i + kProbeStep <= bytes; i += kProbeStep) {
        prefetch_probe(a + i);
        prefetch_probe(b + i);
        for (int j = 0; j < 4; ++j) sums[j] ^= load<VU>(a + i + j * kWidth) ^ load<VU>(b + i + j * kWidth);
    }
    std::uint64_t total = 0;
    for (const VU& s : sums)
        for (int i = 0; i < lanes<VF>; ++i) total ^= s[i];
    return total;
}

inline void probe_write(const char* a, const char* b, char* to, std::int64_t bytes) {
    for (std::int64_t i = 0; i + kProbeStep <= bytes; i += kProbeStep) {
        prefetch_probe(a + i);
        prefetch_probe(b + i);
        for (int j = 0; j < 4; ++j)
            store_non_temporal(to + i + j * kWidth,
                               load<VU>(a + i + j * kWidth) ^ load<VU>(b + i + j * kWidth));
    }
    non_temporal_fence();
}

}  // namespace kl::KL_ISA
