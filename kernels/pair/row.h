// One row as the kernels of every instruction set take it.
#pragma once

#include <cmath>
#include <limits>

#include "api.h"
#include "pair/state.h"

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
    // A row whose temperature is no number has no distribution.
    bool has_temperature() const {
        const double both = inverse_temperature_a + inverse_temperature_b;
        return both == both;
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

// Formulas of fp32 multiply by no larger r, in units of ln 2: past it one counts where its factor, a or b, is
// next to nothing.
constexpr double kMostR = 0x1p20;

// What gradient kernels know about a row.
struct RowScalars {
    double lse_a, lse_b, shift, divergence;
    double top_r;  // no log2 q - log2 p of the row is larger, or no finite one
    RowClass row_class;
    double coefficient_a, coefficient_b;  // row_scale / temperature
    Formula formula;
    double beta;            // in the sums the formula's, in the gradient the row's
    double mean_a, mean_b;  // not for KL, whose only mean is its divergence
};

// What -log q of a label, q at a temperature of its own, adds to one side's gradient: factor (q - onehot).
struct LabelTerm {
    bool of_a = false;
    double factor = 0;  // 0: nothing is added
    double scale = 0;   // log2(e) / temperature
    double lse = 0;     // log2 sum 2^(scale x)
    double at_label = 0;
    std::int64_t column = -1;
};

// nla's beta of a row is -1/alpha over this, so that fp32 holds it wherever -log alpha < 100.
constexpr double kNlaScale = 0x1p64;

// What a row's columns of one block add up to in a formula other than KL.
struct FormulaSums {
    double value = 0, mean_a = 0, mean_b = 0;

    FormulaSums& operator+=(const FormulaSums& s) {
        value += s.value;
        mean_a += s.mean_a;
        mean_b += s.mean_b;
        return *this;
    }
    FormulaSums scaled(int exponent) const {
        return {std::ldexp(value, exponent), std::ldexp(mean_a, exponent), std::ldexp(mean_b, exponent)};
    }
};

struct Destination {
    void* data;  // the row's first column, or nullptr
    Dtype dtype;
};

}  // namespace kl
