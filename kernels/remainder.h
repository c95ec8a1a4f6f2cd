// What a row of logits has outside some given columns: log sum exp and entropy, and the gradient of both.
#pragma once

#include <cstdint>

#include "contract.h"
#include "row.h"

namespace kl {

// ids [A*B, n_ids], contiguous; an id outside [0, columns) names no column.
struct RemainderProblem {
    Logits x;
    RowMask rows;
    const std::int64_t* ids;
    std::int64_t n_ids, size_a, size_b, columns;
    int threads;
};

enum RemainderStat : int {
    kRestLse = 0,      // log2 sum 2^x over the columns not given; x is scaled as kRestForm says
    kRestForm = 1,     // a RemainderForm
    kRestEntropy = 2,  // in nats
    kRemainderStats = 4,
};

enum class RemainderForm : int {
    fp32 = 0,  // logits times an fp32 scale
    fp64 = 1,
};

// u = log sum exp(x / T) and the entropy of the columns not given, both [A*B] in nats; stats as above. The
// entropy is 0 unless asked for. u is -inf where no column has mass.
void remainder(const RemainderProblem&, bool entropy, double* u, double* spread, double* stats);

// Writes 1/T times: to_given at the given columns, and to_rest pi - to_entropy pi (log pi + entropy) in the
// others, pi being their distribution. to_entropy may be null. Rows whose two flows are 0 are not read.
void remainder_gradient(const RemainderProblem&, const double* stats, const double* to_given,
                        const double* to_rest, const double* to_entropy, const Gradient& to);

// One row, as the kernels of every instruction set take it.
struct RemainderRow {
    const void* x;
    Dtype dtype;
    double inverse_temperature;
    std::int64_t columns;
    const std::int64_t* ids;
    std::int64_t n_ids;

    double exact_scale() const { return inverse_temperature * Row::kLog2e; }
};

// sum 2^(x - m) = z and sum 2^(x - m) (x - m) = t, where x is in units of ln 2.
struct RemainderSums {
    double m = -__builtin_inf(), z = 0, t = 0;
    bool bad = false;  // a NaN or +inf

    void operator+=(const RemainderSums& other);
};

// What the gradient of one row starts from.
struct RemainderScalars {
    double lse;
    RemainderForm form;
    double entropy, to_rest, to_entropy;  // flows already times 1/T
};

struct RemainderKernels {
    RemainderSums (*sum)(const RemainderRow&, std::int64_t first, std::int64_t last, bool entropy);
    RemainderSums (*sum_in_fp64)(const RemainderRow&);
    // Leaves the given columns to `place`.
    void (*gradient)(const RemainderRow&, const RemainderScalars&, Destination, std::int64_t first,
                     std::int64_t last, bool stream);
    void (*fill)(Destination, std::int64_t first, std::int64_t last, double value);
    void (*place)(Destination, const std::int64_t* ids, const double* values, std::int64_t n, double factor,
                  std::int64_t first, std::int64_t last);
};

}  // namespace kl
