// Vectors of one instruction set, as wide as its registers. This file is compiled once per set;
// everything in it lives in a namespace of that set, so that the linker cannot pick an AVX-512 copy
// of an inline function for a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__AARCH64EL__)
#include <arm_neon.h>
#endif

#if !defined(KL_ISA)
#error "KL_ISA names the instruction set that this file is compiled for"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define KL_WIDTH 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KL_WIDTH 32
#else
#define KL_WIDTH 16
#endif
// The one set of 16 bytes that has fused multiply-adds and conversions of fp16.
#if defined(__AARCH64EL__)
#define KL_NEON 1
#else
#define KL_NEON 0
#endif

#define KL_INLINE inline __attribute__((always_inline))
#define KL_INLINE_LAMBDA __attribute__((always_inline))
#define KL_NOINLINE __attribute__((noinline))

namespace kl::KL_ISA {

constexpr int kWidth = KL_WIDTH;

typedef float VF __attribute__((vector_size(KL_WIDTH)));
typedef std::int32_t VI __attribute__((vector_size(KL_WIDTH)));
typedef std::uint32_t VU __attribute__((vector_size(KL_WIDTH)));
typedef std::uint16_t VH __attribute__((vector_size(KL_WIDTH)));
typedef double VD __attribute__((vector_size(KL_WIDTH)));
typedef std::int64_t VL __attribute__((vector_size(KL_WIDTH)));
typedef std::uint64_t VUL __attribute__((vector_size(KL_WIDTH)));

template <class V>
struct Traits;
template <>
struct Traits<VF> {
    using Scalar = float;
    using Int = VI;
    using Unsigned = VU;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr std::int32_t sign = INT32_MIN;
    static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
};
template <>
struct Traits<VD> {
    using Scalar = double;
    using Int = VL;
    using Unsigned = VUL;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr std::int64_t sign = INT64_MIN;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
};

template <class V>
constexpr int lanes = kWidth / static_cast<int>(sizeof(typename Traits<V>::Scalar));
template <class V>
using Mask = typename Traits<V>::Int;

template <class V>
KL_INLINE V splat(typename Traits<V>::Scalar x) {
    return x - V{};
}

template <class To, class From>
KL_INLINE To bits(From x) {
    return __builtin_bit_cast(To, x);
}

template <class V>
KL_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
KL_INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// A non-temporal store: the line is neither read first nor kept in the cache. p is aligned to the vector.
// NEON has one of two registers only, see store_pair.
template <class V>
KL_INLINE void store_non_temporal(void* p, V v) {
#if KL_WIDTH == 64
    _mm512_stream_si512(static_cast<__m512i*>(p), bits<__m512i>(v));
#elif KL_WIDTH == 32
    _mm256_stream_si256(static_cast<__m256i*>(p), bits<__m256i>(v));
#elif defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(p), bits<__m128i>(v));
#else
    store(p, v);
#endif
}

KL_INLINE void non_temporal_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// a*b + c in one rounding: for the places whose accuracy needs it. Without hardware for it, fp32
// goes through fp64, where the product is exact.
KL_INLINE VF fma(VF a, VF b, VF c) {
#if KL_WIDTH == 64
    return bits<VF>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif KL_WIDTH == 32
    return bits<VF>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#elif KL_NEON
    return bits<VF>(vfmaq_f32(bits<float32x4_t>(c), bits<float32x4_t>(a), bits<float32x4_t>(b)));
#else
    typedef double Wide __attribute__((vector_size(2 * KL_WIDTH)));
    const auto wide = [](VF x) KL_INLINE_LAMBDA { return __builtin_convertvector(x, Wide); };
    return __builtin_convertvector(wide(a) * wide(b) + wide(c), VF);
#endif
}

// In fp64 there is accuracy to spare, and one or two roundings are the same to every caller.
KL_INLINE VD fma(VD a, VD b, VD c) {
#if KL_WIDTH == 64
    return bits<VD>(_mm512_fmadd_pd(bits<__m512d>(a), bits<__m512d>(b), bits<__m512d>(c)));
#elif KL_WIDTH == 32
    return bits<VD>(_mm256_fmadd_pd(bits<__m256d>(a), bits<__m256d>(b), bits<__m256d>(c)));
#elif KL_NEON
    return bits<VD>(vfmaq_f64(bits<float64x2_t>(c), bits<float64x2_t>(a), bits<float64x2_t>(b)));
#else
    return a * b + c;
#endif
}

// a*b + c with one or two roundings, whichever is faster.
template <class V>
KL_INLINE V mad(V a, V b, V c) {
#if KL_WIDTH >= 32 || KL_NEON
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

// The second argument where either is NaN, as x86 has it. NEON's own maxima drop or keep NaN whichever
// argument it is, so there this is a comparison and a selection.
KL_INLINE VF max(VF a, VF b) {
#if KL_WIDTH == 64
    return bits<VF>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif KL_WIDTH == 32
    return bits<VF>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#elif defined(__SSE2__)
    return bits<VF>(_mm_max_ps(bits<__m128>(a), bits<__m128>(b)));
#else
    return a > b ? a : b;
#endif
}
KL_INLINE VD max(VD a, VD b) { return a > b ? a : b; }

KL_INLINE VF min(VF a, VF b) {
#if KL_WIDTH == 64
    return bits<VF>(_mm512_min_ps(bits<__m512>(a), bits<__m512>(b)));
#elif KL_WIDTH == 32
    return bits<VF>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b)));
#elif defined(__SSE2__)
    return bits<VF>(_mm_min_ps(bits<__m128>(a), bits<__m128>(b)));
#else
    return a < b ? a : b;
#endif
}
KL_INLINE VD min(VD a, VD b) { return a < b ? a : b; }

// max(bound, x) and min(bound, x) for a bound that is a number: NaN stays NaN.
KL_INLINE VF at_least(VF bound, VF x) {
#if KL_NEON
    return bits<VF>(vmaxq_f32(bits<float32x4_t>(bound), bits<float32x4_t>(x)));
#else
    return max(bound, x);
#endif
}
KL_INLINE VF at_most(VF bound, VF x) {
#if KL_NEON
    return bits<VF>(vminq_f32(bits<float32x4_t>(bound), bits<float32x4_t>(x)));
#else
    return min(bound, x);
#endif
}
KL_INLINE VD at_least(VD bound, VD x) {
#if KL_NEON
    return bits<VD>(vmaxq_f64(bits<float64x2_t>(bound), bits<float64x2_t>(x)));
#else
    return max(bound, x);
#endif
}
KL_INLINE VD at_most(VD bound, VD x) {
#if KL_NEON
    return bits<VD>(vminq_f64(bits<float64x2_t>(bound), bits<float64x2_t>(x)));
#else
    return min(bound, x);
#endif
}

// As std::min and std::max have it, without <algorithm>, which takes a quarter of a second to read.
template <class T>
KL_INLINE T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
KL_INLINE T larger(T a, T b) {
    return a < b ? b : a;
}

template <class V>
KL_INLINE V abs(V x) {
    return bits<V>(bits<Mask<V>>(x) & ~Traits<V>::sign);
}

// Carries the sign of `sign` over to the non-negative `x`.
template <class V>
KL_INLINE V with_sign(V x, V sign) {
    using I = Mask<V>;
    return bits<V>(bits<I>(x) | (bits<I>(sign) & Traits<V>::sign));
}

template <class V>
KL_INLINE bool any(Mask<V> mask) {
#if KL_WIDTH == 64
    const auto all = bits<__m512i>(mask);
    return _mm512_test_epi64_mask(all, all) != 0;
#elif KL_WIDTH == 32
    const auto all = bits<__m256i>(mask);
    return _mm256_testz_si256(all, all) == 0;
#elif KL_NEON
    const auto all = bits<uint32x4_t>(mask);
    return vgetq_lane_u64(bits<uint64x2_t>(vpmaxq_u32(all, all)), 0) != 0;
#else
    for (int i = 0; i < lanes<V>; ++i)
        if (mask[i]) return true;
    return false;
#endif
}

template <class V>
KL_INLINE double sum(V v) {
    // Pairwise and in one order, whatever the compiler: the bits of a row must not depend on it.
#if KL_NEON
    if constexpr (sizeof v[0] == sizeof(float)) {
        const auto all = bits<float32x4_t>(v);
        return vpaddd_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(all)), vcvt_high_f64_f32(all)));
    }
#endif
    double s[lanes<V>];
    for (int i = 0; i < lanes<V>; ++i) s[i] = static_cast<double>(v[i]);
    for (int n = lanes<V> / 2; n >= 1; n /= 2)
        for (int i = 0; i < n; ++i) s[i] += s[i + n];
    return s[0];
}

template <class V>
KL_INLINE auto largest(V v) {
#if KL_NEON
    if constexpr (sizeof v[0] == sizeof(float)) {
        const auto all = bits<float32x4_t>(v);
        const VF halves = max(bits<VF>(vextq_f32(all, all, 2)), v);
        return halves[1] > halves[0] ? halves[1] : halves[0];
    }
#endif
    typename Traits<V>::Scalar m[lanes<V>];
    for (int i = 0; i < lanes<V>; ++i) m[i] = v[i];
    for (int n = lanes<V> / 2; n >= 1; n /= 2)
        for (int i = 0; i < n; ++i) m[i] = m[i + n] > m[i] ? m[i + n] : m[i];
    return m[0];
}

}  // namespace kl::KL_ISA
