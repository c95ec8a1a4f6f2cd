// PTX's types by their own names, and the arithmetic on them that C++ has no operator for.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using f32 = float;
using f64 = double;

template <class To, class From>
inline To bits(From x) {
    return std::bit_cast<To>(x);
}

// Subnormal numbers flushed to a zero of their sign, as .ftz does to inputs and results.
inline f32 ftz(f32 x) { return std::fabs(x) < FLT_MIN ? bits<f32>(bits<u32>(x) & 0x80000000u) : x; }

inline f32 from_bf16(u16 x) { return bits<f32>(u32(x) << 16); }
inline f32 from_f16(u16 x) { return f32(bits<_Float16>(x)); }

// NaN becomes the canonical NaN, whatever its sign and payload.
inline u16 to_bf16(f32 x) {
    u32 const b = bits<u32>(x);
    u32 const rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return x != x ? 0x7fff : u16(rounded);
}
template <class T>
inline u16 to_f16(T x) {
    return x != x ? 0x7fff : bits<u16>(_Float16(x));
}

// A NaN beside a number gives the number; of the zeros, +0 is the larger.
template <class Bits, class T>
inline T larger(T a, T b) {
    T m = a > b ? a : b;
    m = a == b ? bits<T>(bits<Bits>(a) & bits<Bits>(b)) : m;
    return a != a ? b : b != b ? a : m;
}
template <class Bits, class T>
inline T smaller(T a, T b) {
    T m = a < b ? a : b;
    m = a == b ? bits<T>(bits<Bits>(a) | bits<Bits>(b)) : m;
    return a != a ? b : b != b ? a : m;
}
template <class Bits, class T>
inline T larger_or_nan(T a, T b) {
    return a != a ? a : b != b ? b : larger<Bits>(a, b);
}
template <class Bits, class T>
inline T smaller_or_nan(T a, T b) {
    return a != a ? a : b != b ? b : smaller<Bits>(a, b);
}

// What PTX leaves undefined (a divisor of 0, the lowest number by -1) must not end this process.
template <class T>
inline T divided(T a, T b) {
    if (b == 0) return T(-1);
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return T(0 - std::make_unsigned_t<T>(a));
    return T(a / b);
}
template <class T>
inline T remainder(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>)
        if (b == -1) return 0;
    return T(a % b);
}

// A float to a 32-bit integer: the nearest one that there is. Of NaN, float32 makes 0 and float64 the lowest.
inline s32 to_s32(f64 x, s32 of_nan) {
    return x != x ? of_nan : s32(std::fmax(std::fmin(x, 2147483647.0), -2147483648.0));
}

inline u32 extracted(u32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (position > 31) return 0;
    a >>= position;
    return length > 31 ? a : a & ((1u << length) - 1);
}
inline s32 extracted(s32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (!length) return 0;
    s32 const sign = a >> std::min(31u, position + length - 1) & 1;
    s32 const value = position > 31 ? -sign : a >> position;
    if (length > 31) return value;
    u32 const low = (1u << length) - 1;
    return s32((u32(value) & low) | (sign ? ~low : 0u));
}

inline u32 reversed(u32 x) {
    u32 r = 0;
    for (int n = 0; n < 32; n++) r |= (x >> n & 1) << (31 - n);
    return r;
}

// Four bytes out of eight, each chosen by four bits of which the highest asks for the byte's sign.
inline u32 permuted(u32 a, u32 b, u32 choice) {
    u64 const x = (u64(b) << 32) | a;
    u32 r = 0;
    for (int n = 0; n < 4; n++) {
        u32 const k = (choice >> (4 * n)) & 15;
        u32 const byte = (x >> (8 * (k & 7))) & 255;
        r |= (k & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * n);
    }
    return r;
}

}  // namespace ptx
