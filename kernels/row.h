// One row as the kernels of every instruction set take it.
#pragma once

#include <limits>

#include "contract.h"
#include "pair_state.h"
#include "state.h"

namespace kl {

// The size that a finite fp64 logit's product with its scale may reach: the difference of two stays finite.
constexpr double kLargestProduct = 0x1p1022;

struct Row {
    const void *a, *b;
    Dtype dtype_a, dtype_b;
    double inverse_temperature_a, inverse_temperature_b;
    std::int64_t columns;

    static constexpr double kLog2e = 1.44269504088896340736;

    // fp32 arithmetic serves unless fp64 logits ask for more, or two temperatures leave b - a without
    // a meaning: then the difference of two products must be right to the last bit.
    bool fits_fp32() const {
        return dtype_a != Dtype::f64 && dtype_b != Dtype::f64 &&
               inverse_temperature_a == inverse_temperature_b;
    }
    double exact_scale() const { return inverse_temperature_a * kLog2e; }
    float scale() const { return static_cast<float>(exact_scale()); }

    // In fp64, the very factor that the fp32 kernels use where they may use one, so that the two agree.
    double scale_a() const {
        return fits_fp32() ? static_cast<double>(scale()) : inverse_temperature_a * kLog2e;
    }
    double scale_b() const {
        return fits_fp32() ? static_cast<double>(scale()) : inverse_temperature_b * kLog2e;
    }
};

// What gradient kernels know about a row.
struct RowScalars {
    double lse_a, lse_b, shift, divergence;
    double top_r;  // no log2 q - log2 p of the row is larger
    Verdict verdict;
    double coefficient_a, coefficient_b;  // row_scale / temperature
    Family family;
    double beta;
    double mean_a, mean_b;  // not for KL, whose only mean is its divergence
};

// What a row's columns of one block add up to in a family other than KL.
struct FamilySums {
    double value = 0, mean_a = 0, mean_b = 0;

    FamilySums& operator+=(const FamilySums& s) {
        value += s.value;
        mean_a += s.mean_a;
        mean_b += s.mean_b;
        return *this;
    }
};

// One side alone, NaN where it has no distribution; exponents in units of ln 2.
struct SideResult {
    static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

    double m = kNan, log_z = kNan;  // log2 sum 2^a = m + log_z
    double entropy = kNan;          // nats
    std::int64_t top = -1;          // the first column of the largest logit
};

struct Destination {
    void* data;  // the row's first column, or nullptr
    Dtype dtype;
};

struct RemainderKernels;

struct Kernels {
    const char* name;
    std::int64_t block;  // columns of one unit of work
    State (*collect)(const Row&, std::int64_t first, std::int64_t last);
    RowResult (*careful)(const Row&);
    FamilySums (*family_sums)(const Row&, const RowScalars&, std::int64_t first, std::int64_t last);
    // stream: store past the cache.
    void (*gradient)(const Row&, const RowScalars&, Destination to_a, Destination to_b, std::int64_t first,
                     std::int64_t last, bool stream);
    PairState (*collect_pair)(const Row&, std::int64_t first, std::int64_t last);
    SideResult (*side)(const void* logits, Dtype, std::int64_t columns, double scale);
    // One logit; and the first of some columns that holds a logit, or -1.
    double (*logit)(const void* logits, Dtype, std::int64_t column);
    std::int64_t (*find)(const void* logits, Dtype, std::int64_t first, std::int64_t columns, float logit);
    // For tests and benches.
    void (*elementary)(int which, const float* x, float* y, std::int64_t n);
    std::uint64_t (*probe_read)(const char* a, const char* b, std::int64_t bytes);
    void (*probe_write)(const char* a, const char* b, char* to, std::int64_t bytes);
    const RemainderKernels* remainder;
};

}  // namespace kl
