// The instructions that need not round correctly, with the worst error that NVIDIA documents for them on
// demand.
#pragma once

#include "values.h"

namespace ptx {

enum class Error : s32 { none, up, down, hashed };  // `hashed`: by a hash of the input, anything in the bound

inline Error g_error = Error::none;
inline u64 g_salt = 0;

inline u64 mixed(u64 x) {
    x ^= x >> 31;
    x *= 0x9e3779b97f4a7c15ull;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9ull;
    return x ^ (x >> 32);
}

// From -most to most.
inline int error_of(u64 input, int most) {
    switch (g_error) {
        case Error::none:
            return 0;
        case Error::up:
            return most;
        case Error::down:
            return -most;
        default:
            return int(mixed(input + g_salt) % u64(2 * most + 1)) - most;
    }
}
inline f32 off_by_ulps(f32 x, u64 input, int ulps) {
    if (g_error == Error::none || x == 0 || !std::isfinite(x)) return x;
    return bits<f32>(bits<u32>(x) + u32(error_of(input, ulps)));
}

// 2 ulp; exact at whole numbers, as the hardware is.
inline f32 ex2(f32 x) {
    x = ftz(x);
    if (x != x) return bits<f32>(0x7fffffffu);
    f32 const y = ftz(f32(std::exp2(f64(x))));
    return std::floor(x) == x ? y : ftz(off_by_ulps(y, bits<u32>(x), 2));
}

// 2^-22.6: absolute for inputs in (0.5, 2), relative elsewhere.
inline f32 lg2(f32 x) {
    x = ftz(x);
    if (x < 0 || x != x) return bits<f32>(0x7fffffffu);
    if (x == 0) return -INFINITY;
    f64 y = std::log2(f64(x));
    if (g_error != Error::none && x != 1 && std::isfinite(y)) {
        f64 const e = 0x1p-22 * std::exp2(-0.6) * (error_of(bits<u32>(x), 4) / 4.0);
        y = x > 0.5f && x < 2 ? y + e : y * (1 + e);
    }
    return f32(y);
}

// 2 ulp.
inline f32 div_full(f32 a, f32 b) { return off_by_ulps(a / b, (u64(bits<u32>(a)) << 32) | bits<u32>(b), 2); }

// A reciprocal of, and to, the upper 32 bits, from which Triton's division refines.
inline f64 rcp_gross(f64 x) {
    constexpr u64 upper = 0xffffffff00000000ull;
    f64 const a = bits<f64>(bits<u64>(x) & upper);
    if (a != a) return a;
    if (std::fabs(a) < DBL_MIN) return std::copysign(INFINITY, a);
    f64 const r = 1.0 / a;
    if (std::fabs(r) < DBL_MIN) return std::copysign(0.0, r);
    return bits<f64>(bits<u64>(r) & upper);
}

}  // namespace ptx
