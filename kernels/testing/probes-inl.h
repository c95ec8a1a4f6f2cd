// What tests and benches ask of one instruction set: its elementary functions, and what memory gives to loops
// that do nothing else.
#pragma once

#include "simd/elementary-inl.h"
#include "simd/formats-inl.h"

namespace kl::KL_ISA {

// To memory as a T, and back.
template <class T>
inline VF stored(VF x) {
    T kept[kStep<T>];
    store_pair(Cached{}, kept, Pair<VF>{x, x});
    const auto back = load_pair(kept);
    return back.x == back.y ? back.y : splat<VF>(__builtin_nanf(""));
}

inline VF elementary_function(int which, VF x) {
    const VF one = splat<VF>(1);
    switch (which) {
        case 0:
            return exp2(x);
        case 1:
            return g2(x);
        case 2:
            return exp2m1(x);
        case 3:
            return exponential(x).whole;
        case 4:
            return exponential(x).less_one;
        case 5:
            return log_one_plus(x, one + x).log;
        case 6:
            return log_one_plus(x, one + x).gap;
        case 8:
            return both_ways(x).power;
        case 9:
            return both_ways(x).g;
        case 10:
            return both_ways(x).h;
        case 11:
            return Multiple<VF>(1.0 / 3).of_exp2(reduce(clamp_for_product(x)));
        case 12:
            return stored<Bf16>(x);
        case 13:
            return stored<F16>(x);
        default:
            return log_one_plus(x - one, x).log;
    }
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
