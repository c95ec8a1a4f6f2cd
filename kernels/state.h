// What a stretch of columns says about its row, and how two stretches become one.
//
// Exponents and differences are in units of ln 2. With d = b - a, a stretch seen from the frame
// (m, c) keeps, over its columns,
//     z = sum w,   a1 = sum w x,   a2 = sum w g(x) / ln 2,   w = 2^(a - m),   x = d - c,
// where g(x) = 2^x - 1 - x ln 2 >= 0. Then y = E[2^x - 1] = ln 2 (a1 + a2) / z and
//     KL(a||b) = E[g] + log1p(y) - y,   lse(b) - lse(a) = c + log2(1 + y).
#pragma once

#include <cmath>
#include <limits>

#include "contract.h"

namespace kl {

constexpr double kLn2 = 0.69314718055994530942;

enum Flag : unsigned {
    kSawNan = 1,        // NaN or +inf
    kSawHole = 2,       // -inf on either side
    kSawInfinite = 4,   // -inf in b where a is finite
    kSawB = 8,          // some finite b
    kSawRounding = 16,  // d was rounded to fp32 before c was taken off
    kSawVast = 32,      // finite, but so large that fp32 products overflow
    kSawLargeX = 64,    // 2^x might outweigh a weight that underflows
    kSawTail = 128,     // 2^x with an x past 16, whose rounding shows in lse(b) if nothing outweighs it
    kSawFarTail = 256,  // past 32: it shows in the value too
    kSawFarB = 512,     // a b so low that it may count even where a's weight underflows
    kSawHugeA = 1024,   // an a so large that fp32 cannot subtract m from it
};

// In fp32, because the sweeps hold it so, and a state must know exactly where it was seen from.
struct Frame {
    float m = 0, c = 0;

    bool operator==(const Frame&) const = default;
};

struct State {
    Frame frame;
    double z = 0, a1 = 0, a2 = 0;
    double top_d = -std::numeric_limits<double>::infinity();  // the largest d
    // What the rounding errors of z and of a2 scale with: the sums of what was summed up in fp32, and what
    // moving from frame to frame made of their errors.
    double spent_z = 0, spent = 0;
    unsigned flags = 0;

    bool has_mass() const { return z > 0; }
    bool is_empty() const { return z == 0 && a2 == 0; }
};

// A result whose `spent` is more than this many times itself is looked at again: a rounding error of a few
// 2^-24 of the one would be past the promise in the other.
constexpr double kWorstError = 8;

// The rounding of fp64 in units of fp32's. It shows only where a move multiplies what was summed by
// 2^45 or so.
constexpr double kFp64 = 0x1p-28;

// Independent errors add up like this; std::hypot, whose squares cannot overflow, takes ten times as long.
inline double length(double x, double y, double z = 0) { return std::sqrt(x * x + y * y + z * z); }

// expm1(x) - x without cancellation.
double g(double x);

// What the rounding error of a1 scales with: at least sum w |x|, for the z and a2 that were summed up in
// fp32.
double size_of_a1(double spent_z, double a1, double spent);

// What a move to a c that lies h nats higher makes of a state: e^-h a2 + expm1(-h) a1 + z g(-h) of its a2.
struct Move {
    double less_one, power, g_of;

    explicit Move(double h);

    // What the error of a2 scales with afterwards, from what those of z, a1 and a2 scale with before. Of the
    // three terms much may cancel; their rounding errors do not. They are independent, so their squares add.
    double error(double z, double of_a1, double of_a2) const;
};

// The same stretch seen from another frame.
State seen_from(Frame, const State&);

// Two stretches, seen from the z-weighted mean of their shifts. The order of the arguments counts:
// rows are bitwise reproducible because callers always fold from the first column to the last.
State merge(const State&, const State&);

struct RowResult {
    double divergence = 0;  // in nats
    double lse_a = 0;       // log2 sum 2^a
    double shift = 0;       // log2 sum 2^b - lse_a
    Verdict verdict = Verdict::plain;
    bool trusted = true;      // false: rounding may have eaten the result, look at the row again in fp64
    bool sums_b_too = false;  // true: lse(b) rests on a few large 2^x and is better summed by itself
    double mean_d = 0;        // E_a[d]
    double top_r = std::numeric_limits<double>::infinity();  // no log2 q - log2 p is larger
};

RowResult finish(const State&);
RowResult nan_result();

// KL in nats from y and from E[x], E[g] in nats, by whichever form does not cancel.
double divergence_from(double mean_x, double mean_g);
// The same where y is known better than as the sum of both.
double divergence_from(double mean_x, double mean_g, double y);

}  // namespace kl
