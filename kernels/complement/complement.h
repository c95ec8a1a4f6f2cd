// The columns of a row other than some picked ones: their log-sum-exp, entropy, and gradients.
#pragma once

#include <cstdint>

#include "api.h"
#include "pair/row.h"

namespace kl {

// ids [A*B, n_ids], contiguous; an id outside [0, columns) names no column.
struct ComplementArgs {
    Logits x;
    RowMask valid;
    const std::int64_t* ids;
    std::int64_t n_ids, size_a, size_b, columns;
    int threads;
    RowScales scales{};

    double scale(std::int64_t r) const { return scales.first(r, x); }
};

enum ComplementStat : int {
    kRestLse = 0,      // log2 sum 2^x over the columns not picked; x is scaled as kRestForm says
    kRestForm = 1,     // a ComplementForm
    kRestEntropy = 2,  // in nats
    kComplementStats = 4,
};

enum class ComplementForm : int {
    fp32 = 0,  // logits times an fp32 scale
    fp64 = 1,
};

// log sum exp(x / T) and the entropy of the columns not picked, both [A*B] in nats; stats as above. The
// entropy is 0 unless asked for. The log-sum-exp is -inf where no column has mass.
void complement(const ComplementArgs&, bool entropy, double* rest_lse, double* rest_entropy, double* stats);

// Writes 1/T times: grad_picked at the picked columns, and grad_rest_lse pi - grad_rest_entropy pi (log pi +
// entropy) in the others, pi being their distribution. grad_rest_entropy may be null. Rows whose
// grad_rest_lse and grad_rest_entropy are 0 are not read.
void complement_gradient(const ComplementArgs&, const double* stats, const double* grad_picked,
                         const double* grad_rest_lse, const double* grad_rest_entropy, const Gradient& to);

// One row, as the kernels of every instruction set take it.
struct ComplementRow {
    const void* x;
    Dtype dtype;
    double inverse_temperature;
    std::int64_t columns;
    const std::int64_t* ids;
    std::int64_t n_ids;
    std::int64_t* scratch;  // n_ids numbers of the calling thread

    double exact_scale() const { return inverse_temperature * Row::kLog2e; }
};

// sum 2^(x - m) = z and sum 2^(x - m) (x - m) = t, where x is in units of ln 2.
struct ComplementSums {
    double m = -__builtin_inf(), z = 0, t = 0;
    bool bad = false;  // a NaN or +inf

    void operator+=(const ComplementSums& other);
};

// What the gradient of one row starts from.
struct ComplementScalars {
    double lse;
    ComplementForm form;
    double entropy, grad_rest_lse, grad_rest_entropy;  // flows already times 1/T
};

// Whether 2^exponents at this temperature fit fp32 at all; single rows may turn out not to.
bool fits_fp32(const ComplementRow&);

// What a row's sums come to: log2 sum 2^x with x scaled as `form` says, and in nats the very log-sum-exp of
// the logits and the entropy.
struct ComplementResult {
    double lse;
    ComplementForm form;
    double rest_lse, entropy;
};

struct ComplementKernels {
    ComplementSums (*sum)(const ComplementRow&, std::int64_t first, std::int64_t last, bool entropy);
    // All columns in fp32 with their entropy, for rows known to hold neither a NaN nor +inf, measured from
    // their log-sum-exp or nearly.
    ComplementSums (*sum_known)(const ComplementRow&, float m, std::int64_t first, std::int64_t last);
    ComplementSums (*sum_in_fp64)(const ComplementRow&);
    // Leaves the picked columns to `place`.
    void (*gradient)(const ComplementRow&, const ComplementScalars&, Destination, std::int64_t first,
                     std::int64_t last, bool non_temporal);
    void (*fill)(Destination, std::int64_t first, std::int64_t last, double value);
    void (*place)(Destination, const std::int64_t* ids, const double* values, std::int64_t n, double factor,
                  std::int64_t first, std::int64_t last);
};

// From the sums in fp32; those of a row that fp32 does not fit play no part.
ComplementResult finish(const ComplementKernels&, const ComplementRow&, ComplementSums, bool entropy);

}  // namespace kl
