// Logits in memory to vectors and back. bf16 and fp16 are widened exactly; stores round to nearest even.
#pragma once

#include <type_traits>

#include "api.h"
#include "simd/vectors-inl.h"

namespace kl::KL_ISA {

struct Bf16 {
    std::uint16_t bits;
};
struct F16 {
    std::uint16_t bits;
};

// What units are instantiated for.
#define KL_FORMATS(X) X(float) X(Bf16) X(F16) X(double)

// The vector that arithmetic on a T uses.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, VD, VF>;

// Two vectors at a time, because that is what one vector of 16-bit logits widens to.
template <class V>
struct Pair {
    V x, y;
};
template <class V>
Pair(V, V) -> Pair<V>;  // which Clang 16 does not find by itself
template <class T>
constexpr int kStep = 2 * lanes<Wide<T>>;

template <class T>
constexpr T minus_infinity() {
    if constexpr (std::is_same_v<T, Bf16>)
        return {0xff80u};
    else if constexpr (std::is_same_v<T, F16>)
        return {0xfc00u};
    else
        return static_cast<T>(-__builtin_inf());
}

template <class T>
KL_INLINE Pair<Wide<T>> load_pair(const T* p) {
    return {load<Wide<T>>(p), load<Wide<T>>(p + lanes<Wide<T>>)};
}

// Even columns in x and odd ones in y: a shift and a mask instead of two unpacking shuffles. Both
// sides of a row come in the same order, so nothing downstream can tell.
KL_INLINE Pair<VF> load_pair(const Bf16* p) {
    VU v = load<VU>(p);
    return {bits<VF>(v << 16), bits<VF>(v & 0xffff0000u)};
}

#if KL_WIDTH == 64
KL_INLINE VF widen(const F16* p) {
    return bits<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif KL_WIDTH == 32
KL_INLINE VF widen(const F16* p) {
    return bits<VF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif KL_NEON
KL_INLINE VF widen(const F16* p) { return bits<VF>(vcvt_f32_f16(load<float16x4_t>(p))); }
#else
typedef std::uint16_t Half __attribute__((vector_size(KL_WIDTH / 2)));
KL_INLINE VF widen(const F16* p) {
    const VU h = __builtin_convertvector(load<Half>(p), VU);
    // Moving the exponent by 2^112 in a product makes subnormals right without a branch.
    VF magnitude = bits<VF>((h & 0x7fffu) << 13) * 0x1p112f;
    VU special = bits<VU>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return bits<VF>(bits<VU>(magnitude) | special | ((h & 0x8000u) << 16));
}
#endif
KL_INLINE Pair<VF> load_pair(const F16* p) { return {widen(p), widen(p + lanes<VF>)}; }

// NonTemporal is std::true_type or std::false_type in loops that wait for memory and are compiled once for
// each. In others it is bool: each store asks, which costs a predicted branch and halves the code.
template <class NonTemporal, class V>
KL_INLINE void put(NonTemporal non_temporal, void* p, V v) {
    if (non_temporal)
        store_non_temporal(p, v);
    else
        store(p, v);
}

template <class NonTemporal, class T>
KL_INLINE void store_pair(NonTemporal non_temporal, T* p, Pair<Wide<T>> v) {
#if KL_NEON
    if (non_temporal) {
        asm volatile("stnp %q1, %q2, [%0]" : : "r"(p), "w"(v.x), "w"(v.y) : "memory");
        return;
    }
#endif
    put(non_temporal, p, v.x);
    put(non_temporal, p + lanes<Wide<T>>, v.y);
}

// No NaN comes here whose payload the rounding carry could overrun: rows with NaN go to fill().
template <class NonTemporal>
KL_INLINE void store_pair(NonTemporal non_temporal, Bf16* p, Pair<VF> v) {
    VU even = bits<VU>(v.x), odd = bits<VU>(v.y);
#if KL_WIDTH == 64
    // Cut off first and rounded in 16-bit lanes, all columns at once: up where what was cut off is more than
    // half a unit, or half of one and the number is odd.
    const auto cut = bits<__m512i>((even >> 16) | (odd & 0xffff0000u));
    const auto rest = bits<__m512i>((even & 0xffffu) | (odd << 16) | (bits<VU>(cut) & 0x10001u));
    const __mmask32 up = _mm512_cmpgt_epu16_mask(rest, _mm512_set1_epi16(INT16_MIN));
    put(non_temporal, p, bits<VU>(_mm512_mask_add_epi16(cut, up, cut, _mm512_set1_epi16(1))));
#else
    even += 0x7fffu + ((even >> 16) & 1u);
    odd += 0x7fffu + ((odd >> 16) & 1u);
#if KL_NEON
    put(non_temporal, p, bits<VU>(vsriq_n_u32(bits<uint32x4_t>(odd), bits<uint32x4_t>(even), 16)));
#else
    put(non_temporal, p, (even >> 16) | (odd & 0xffff0000u));
#endif
#endif
}

#if !KL_NEON
// fp16's bits in the lower half of each lane.
KL_INLINE VU round_to_f16(VF x) {
    const VI u = bits<VI>(x), sign = (u >> 16) & 0x8000, m = u & INT32_MAX;
    // What is subnormal in fp16 is rounded at 2^-24 by an addition in fp32.
    const VI subnormal = bits<VI>(bits<VF>(m) + 0.5f) - 0x3f000000;
    const VI normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
    const VI finite = m < 0x38800000 ? subnormal : normal,
             special = m > 0x7f800000 ? VI{} + 0x7e00 : VI{} + 0x7c00;
    return bits<VU>(sign | (m < 0x477ff000 ? finite : special));
}
#endif

template <class NonTemporal>
KL_INLINE void store_pair([[maybe_unused]] NonTemporal non_temporal, F16* p, Pair<VF> v) {
#if KL_WIDTH == 64
    __m256i x = _mm512_cvtps_ph(bits<__m512>(v.x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i y = _mm512_cvtps_ph(bits<__m512>(v.y), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    put(non_temporal, p, bits<VU>(_mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1)));
#elif KL_WIDTH == 32
    __m128i x = _mm256_cvtps_ph(bits<__m256>(v.x), _MM_FROUND_TO_NEAREST_INT);
    __m128i y = _mm256_cvtps_ph(bits<__m256>(v.y), _MM_FROUND_TO_NEAREST_INT);
    put(non_temporal, p, bits<VU>(_mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1)));
#elif KL_NEON
    const float16x4_t x = vcvt_f16_f32(bits<float32x4_t>(v.x));
    put(non_temporal, p, bits<VU>(vcvt_high_f16_f32(x, bits<float32x4_t>(v.y))));
#else
    store(p, __builtin_convertvector(round_to_f16(v.x), Half));
    store(p + lanes<VF>, __builtin_convertvector(round_to_f16(v.y), Half));
#endif
}

// One element at a time, for what does not fill a vector.
inline float widen_one(float x) { return x; }
inline double widen_one(double x) { return x; }
inline float widen_one(Bf16 x) { return bits<float>(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widen_one(F16 x) {
    std::uint32_t h = x.bits, special = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    std::uint32_t magnitude = bits<std::uint32_t>(bits<float>((h & 0x7fffu) << 13) * 0x1p112f);
    return bits<float>(magnitude | special | ((h & 0x8000u) << 16));
}

inline void round_one(double x, double& out) { out = x; }
inline void round_one(double x, float& out) { out = static_cast<float>(x); }
inline void round_one(float x, float& out) { out = x; }
inline void round_one(float x, Bf16& out) {
    std::uint32_t u = bits<std::uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        u = 0x7fc00000u;
    else
        u += 0x7fffu + ((u >> 16) & 1u);
    out.bits = static_cast<std::uint16_t>(u >> 16);
}
inline void round_one(float x, F16& out) {
#if KL_NEON
    out.bits = bits<std::uint16_t>(static_cast<__fp16>(x));
#else
    out.bits = static_cast<std::uint16_t>(round_to_f16(splat<VF>(x))[0]);
#endif
}
// Through fp32 a double would be rounded twice; the odd bit keeps the second rounding honest.
template <class T>
inline void round_one(double x, T& out) {
    float f = static_cast<float>(x);
    std::uint32_t u = bits<std::uint32_t>(f);
    if (static_cast<double>(f) != x && x == x && (u & 1u) == 0 && (u & 0x7f800000u) != 0x7f800000u) {
        bool toward_zero = (x < 0 ? -x : x) > (f < 0 ? -static_cast<double>(f) : static_cast<double>(f));
        if (toward_zero)
            u |= 1u;
        else if ((u & 0x7fffffffu) != 0)
            u -= 1u;
    }
    round_one(bits<float>(u), out);
}

constexpr std::int64_t kScratchColumns = 512;  // columns widened at a time, on the stack

// run<T>() with the T that holds a `t` other than fp64, for which nothing is compiled.
template <class Run>
inline auto in_fp32_format(Dtype t, Run run) {
    switch (t) {
        case Dtype::bf16:
            return run.template operator()<Bf16>();
        case Dtype::f16:
            return run.template operator()<F16>();
        default:
            return run.template operator()<float>();
    }
}

// The same for any `t`.
template <class Run>
inline auto in_format(Dtype t, Run run) {
    return t == Dtype::f64 ? run.template operator()<double>() : in_fp32_format(t, run);
}

// Widens n columns at `p` into `out`.
template <class R, class T>
inline void widen_run(const T* p, std::int64_t n, R* out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<R>(widen_one(p[i]));
}

template <class R>
inline void widen_run(const void* p, Dtype t, std::int64_t column, std::int64_t n, R* out) {
    in_format(t, [&]<class T>() { widen_run(static_cast<const T*>(p) + column, n, out); });
}

template <class R>
inline void round_run(const R* in, std::int64_t n, void* p, Dtype t, std::int64_t column) {
    in_format(t, [&]<class T>() {
        for (std::int64_t i = 0; i < n; ++i) round_one(in[i], static_cast<T*>(p)[column + i]);
    });
}

}  // namespace kl::KL_ISA
