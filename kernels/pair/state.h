// What a span of columns says about its row, and how two spans become one.
//
// Exponents and differences are in units of ln 2. With d = b - a, a span measured from the reference
// (m, c) keeps, over its columns,
//     z = sum w,   a1 = sum w x,   a2 = sum w g(x) / ln 2,   w = 2^(a - m),   x = d - c,
// where g(x) = 2^x - 1 - x ln 2 >= 0. Then y = E[2^x - 1] = ln 2 (a1 + a2) / z and
//     KL(a||b) = E[g] + log1p(y) - y,   lse(b) - lse(a) = c + log2(1 + y).
//
// Columns that b (nearly) lacks would hide all others in these sums: of them, d = -inf or far below c, only
//     lone_z = sum w,   lone_x = -sum w x  (of the finite x)
// are kept, and z, a1 and a2 are about the others, whose share of a's mass is s = z / (z + lone_z). Then
//     KL(a||b) = s (KL of the others + ln s) + ln 2 (lone_x + lone_z (shift - c)) / (z + lone_z),
// shift = lse(b) - lse(a), or +inf where b lacks such a column. Columns that a lacks are sums of the usual
// kind, in their limit.
#pragma once

#include <cmath>
#include <limits>

#include "api.h"

namespace kl {

constexpr double kLn2 = 0.69314718055994530942;

enum Flag : unsigned {
    kSawNan = 1,          // NaN or +inf
    kSawNegInf = 2,       // -inf on one side, or on either
    kSawInfinite = 4,     // -inf in b where a is finite
    kSawB = 8,            // some finite b
    kSawRounding = 16,    // of token statistics: d was rounded to fp32 before c was taken off, in any column
    kSawOutOfRange = 32,  // one side finite, but so large that fp32 products overflow
    kSawFarB = 64,        // a finite b so low that no fp32 formula may multiply by its distance
    kSawHugeA = 128,      // an a so large that fp32 cannot subtract m from it
    kSawMasked = 256,     // -inf on both sides
};

// Held in fp32 like the sweeps hold it: a state must know the very reference that its sums were taken from.
struct Reference {
    float m = 0, c = 0;

    bool operator==(const Reference&) const = default;
};

struct State {
    Reference reference;
    double z = 0, a1 = 0, a2 = 0;
    double top_d = -std::numeric_limits<double>::infinity();  // the largest d
    // What the errors of z and of a2 scale with: what was summed up in fp32, rebased as errors are.
    double fp32_sum_z = 0, fp32_sum = 0;
    double rounded_z = 0;  // a's mass at most in columns whose d was rounded to fp32 before c was taken off
    unsigned flags = 0;
    double lone_z = 0, lone_x = 0;
    double far_sum = 0;  // what the error of a1 scales with where a2 has the same with the other sign

    bool has_mass() const { return z > 0; }
    bool is_empty() const { return z == 0 && a2 == 0 && lone_z == 0; }

    // Another span, measured from the same reference. Always inlined: units of every instruction set call it.
    [[gnu::always_inline]] void add(const State& s) {
        z += s.z;
        a1 += s.a1;
        a2 += s.a2;
        fp32_sum_z += s.fp32_sum_z;
        fp32_sum += s.fp32_sum;
        rounded_z += s.rounded_z;
        top_d = s.top_d > top_d ? s.top_d : top_d;
        flags |= s.flags;
        lone_z += s.lone_z;
        lone_x += s.lone_x;
        far_sum += s.far_sum;
    }
};

// A result whose fp32_sum is more than this many times itself is computed again by the fallback: a rounding
// error of a few 2^-24 of the one would be past the promise in the other.
constexpr double kWorstError = 8;

// The rounding of fp64 in units of fp32's. It shows only where rebasing multiplies what was summed by 2^45
// or so.
constexpr double kFp64 = 0x1p-28;

// The size of a sum of independent errors. std::hypot takes ten times as long.
inline double length(double x, double y, double z = 0) { return std::sqrt(x * x + y * y + z * z); }

// expm1(x) - x without cancellation.
double g(double x);

// What the rounding error of a1 scales with, for these sums in fp32: at least sum w |x|.
double size_of_a1(double fp32_sum_z, double a1, double fp32_sum);

// The coefficients of rebasing to a c that lies h nats higher: a2 becomes e^-h a2 + expm1(-h) a1 + z g(-h).
struct Rebase {
    double less_one, power, g_of;

    explicit Rebase(double h);

    // What the error of a2 scales with afterwards, from what those of z, a1 and a2 scale with before. The
    // three terms may cancel, their rounding errors do not: they are independent, so their squares add.
    double error(double z, double of_a1, double of_a2) const;
};

// The same span measured from another reference.
State rebase(const State&, Reference);

// Two spans as one, measured from the z-weighted mean of their shifts. The order of the arguments counts:
// rows are bitwise reproducible because callers always fold from the first column to the last.
State merge(const State&, const State&);

struct RowResult {
    double divergence = 0;  // in nats
    double lse_a = 0;       // log2 sum 2^a
    double shift = 0;       // log2 sum 2^b - lse_a
    double lse_b = 0;       // from the fallback only: where both are too large for their sum to keep it
    RowClass row_class = RowClass::all_finite;
    bool trusted = true;  // false: cancellation may have lost the result, and the fallback computes it again
    double top_r = std::numeric_limits<double>::infinity();  // no log2 q - log2 p is larger
    bool coarse_shift = false;  // of an infinite KL: lse(b) - lse(a) is not good enough for a formula
};

// The mass at most, measured from m, of `columns` of 16-bit logits whose d may be rounded.
double rounded_mass(Reference, double columns);

RowResult finish(const State&);
RowResult nan_result();

// KL in nats from y and from E[x], E[g] in nats, by whichever form does not cancel.
double divergence_from(double mean_x, double mean_g);
// The same where y is known better than as the sum of both.
double divergence_from(double mean_x, double mean_g, double y);

}  // namespace kl
