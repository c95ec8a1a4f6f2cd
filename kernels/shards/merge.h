// Rows whose columns lie on several shards: what a shard says of its own columns, how the shards' states
// become those of whole rows, and the stats that a shard's gradient then starts from. In nats, fp64. The
// mathematics is that of docs/distributed.md.
#pragma once

#include "api.h"

namespace kl {

// A state holds 2 + n numbers per row, each in a line of `rows`: log sum e^a and log sum e^b less that, then
// what n says: KL(a||b) inside these columns (n = 1), and KL(b||a) behind it (n = 2).

struct Units {
    double shared;
    const double* of_rows;  // nullptr: all rows share one

    double operator[](std::int64_t row) const { return of_rows ? of_rows[row] : shared; }
};

// The state of one shard's columns, from their stats [rows, kStats] and the n values [rows] of `inside`.
// `units` are the nats in a unit of the stats' exponents, of each row, or one of all. False where a
// normaliser is not finite: a side without mass, or a NaN, and the stats cannot tell which.
bool shard_states(const void* stats, bool wide, const Units&, std::int64_t rows, const void* const* inside,
                  int n, double* out);

// `out` [2 + n, rows] from `found` [shards, 2 + n, rows]; there log sum e^a may be -inf, and the second
// number is log sum e^b itself then. Shards are merged in their order: the same bits on each. False where a
// normaliser is so far out that stats cannot hold it.
bool merge_shards(const double* found, std::int64_t shards, std::int64_t rows, int n, double* out);

// `out` [rows, kStats]: what gradient() and formula_sums() need of a shard's columns, from their own stats,
// the whole rows' normalisers `log_a` and `ratio` and, `numbers` [rows, 4], their value, means and beta.
void whole_row_stats(const void* local, bool wide, const Units&, std::int64_t rows, Formula formula,
                     const double* log_a, const double* ratio, const double* numbers, void* out);

}  // namespace kl
