// What a span of columns says about both KLs of its row and about both entropies, and how two spans
// become one.
//
// As in pair/state.h, exponents and differences are in units of ln 2, d = b - a, and measured from (m, c)
//     w = 2^(a - m),   x = d - c,   z = sum w,   a1 = sum w x,   a2 = sum w g(x) / ln 2.
// The other direction measures -x with the weights u = w 2^x = 2^(b - m - c), and keeps
//     zb = sum u,   b2 = sum u g(-x) / ln 2,   while   b1 = sum u (-x) = -(a1 + a2 + b2)
// follows. Of zb - z = ln 2 (a1 + a2) the left side is exact where it is large, the right side where it is
// small. Where c is lse(b) - lse(a), between both directions' means of d, zb is z and
//     KL(a||b) = ln 2 a2 / z,   KL(b||a) = ln 2 b2 / zb:
// nothing cancels in either.
#pragma once

#include <cstdint>
#include <limits>

#include "pair/state.h"

namespace kl {

// The largest logit of one side, and the first run of columns that holds it.
struct Top {
    float logit = -std::numeric_limits<float>::infinity();
    std::int64_t first = -1, columns = 0;

    // Of equal ones the earlier stays.
    void take(const Top& later) {
        if (later.logit > logit) *this = later;
    }
};

struct PairState {
    Reference reference;
    double z = 0, a1 = 0, a2 = 0, zb = 0, b2 = 0;
    double ea = 0, eb = 0;  // sum w (a - m) and sum u (b - m - c), for the entropies
    // What the rounding errors of z and a2, and of zb and b2, scale with, as in pair/state.h.
    double fp32_sum_z = 0, fp32_sum_a = 0, fp32_sum_zb = 0, fp32_sum_b = 0;
    Top top_a, top_b;
    unsigned flags = 0;  // kSawRounding; kSawInfinite where KL(b||a) is infinite, and b2 then says nothing
    bool usable = true;  // false: fp32 sums cannot do this row

    bool is_empty() const { return z == 0 && zb == 0; }
    // (zb - z) / ln 2, by its more exact side, and what its rounding error scales with.
    double gap() const { return is_near() ? a1 + a2 : (zb - z) / kLn2; }
    double error_of_gap() const {
        return is_near() ? size_of_a1(fp32_sum_z, a1, fp32_sum_a) + fp32_sum_a : error_of_masses();
    }
    double error_of_masses() const { return (fp32_sum_z + fp32_sum_zb) / kLn2; }

private:
    bool is_near() const {
        const double sum = a1 + a2, size = sum < 0 ? -sum : sum;
        return 2 * kLn2 * size < (z < zb ? z : zb);
    }
};

// The same span measured from another reference.
PairState rebase(const PairState&, Reference);

// The reference in which the state's zb is its z.
Reference centre(const PairState&);

// The order of the arguments counts, as in pair/state.h.
PairState merge(const PairState&, const PairState&);

struct PairResult {
    double forward = 0, reverse = 0;      // KL(a||b) and KL(b||a), nats
    double entropy_a = 0, entropy_b = 0;  // nats
    double lse_a = 0, lse_b = 0;          // log2 sum 2^a, of b
    double shift = 0;                     // lse_b - lse_a, known better than as their difference
    bool trusted = true;                  // false: cancellation may have lost some of it
};

PairResult finish(const PairState&);

// One side alone, NaN where it has no distribution; exponents in units of ln 2.
struct SideResult {
    static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

    double m = kNan, log_z = kNan;  // log2 sum 2^a = m + log_z
    double entropy = kNan;          // nats
    std::int64_t top = -1;          // the first column of the largest logit
};

}  // namespace kl
