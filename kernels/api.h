// What a caller hands to the kernels and what it gets back: pointers, strides, sizes, row scalars.
//
// A divergence is always written in the two roles a and b of its formula, KL(a||b) from the weights' side
// `a` to the other side `b`; which of them is the student is the caller's business.
#pragma once

#include <cstdint>

namespace kl {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

constexpr std::int64_t size_of(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// A logits tensor [A, B, V] whose last stride is 1; the leading strides count elements and may be 0.
struct Logits {
    const void* data;
    std::int64_t stride_a, stride_b;
    Dtype dtype;
    double scale;  // 1 / temperature
};

// Where a gradient goes; data == nullptr where nobody asked for it.
struct Gradient {
    void* data;
    std::int64_t stride_a, stride_b;
    Dtype dtype;
};

// 1 / temperature of each row, [A*B, columns]: one column of both sides, or a's and b's. data == nullptr:
// every row has that of `Logits`, which play no part otherwise.
struct RowScales {
    const double* data = nullptr;
    std::int64_t columns = 0;

    double first(std::int64_t r, const Logits& of) const { return data ? data[r * columns] : of.scale; }
    double last(std::int64_t r, const Logits& of) const {
        return data ? data[(r + 1) * columns - 1] : of.scale;
    }
};

// bool [A, B]; data == nullptr means every row counts.
struct RowMask {
    const std::uint8_t* data;
    std::int64_t stride_a, stride_b;
};

// Every formula beside KL(a||b), with m = beta a + (1 - beta) b. Each names a struct of pair/formulas-inl.h,
// without which nothing compiles, and is the name that Python says.
#define KL_FORMULAS(X)                                    \
    X(jeffreys) /* (1 - beta) KL(a||b) + beta KL(b||a) */ \
    X(js)       /* beta KL(a||m) + (1 - beta) KL(b||m) */ \
    X(skew)     /* KL(a||m) */                            \
    X(tv)       /* sum |a - b| / 2 */                     \
    X(nla)      /* -log alpha, alpha = sum min(a, b) */   \
    X(lk)       /* l KL(a||b) + (1 - l) tv, l = exp(-beta alpha) */

enum class Formula : int {
    kl,
#define X(name) name,
    KL_FORMULAS(X)
#undef X
        comparison,  // js at 1/2, tv and alpha at once, of which token statistics take the sums alone
};

// Throws std::invalid_argument where there is no formula of that name.
Formula formula_named(const char* name);

struct RowPair {
    Logits a, b;
    RowMask valid;
    std::int64_t size_a, size_b, columns;
    int threads;
    Formula formula;
    double beta;  // of jeffreys, js and skew between 0 and 1 and neither; of lk at least 0
    RowScales scales{};

    double a_scale(std::int64_t r) const { return scales.first(r, a); }
    double b_scale(std::int64_t r) const { return scales.last(r, b); }
};

// Numbers kept per row between value and gradient. Exponents and differences are in units of ln 2
// and split into a high and a low part, because one fp32 cannot hold them well enough.
enum Stat : int {
    kLseHi = 0,  // log2 sum 2^a
    kLseLo = 1,
    kShiftHi = 2,  // log2 sum 2^b - log2 sum 2^a
    kShiftLo = 3,
    kDivergence = 4,  // KL(a||b), whatever the formula
    kRowClass = 5,    // a RowClass
    kTopR = 6,        // the largest log2 q - log2 p, or +inf where it was not noted
    // Of the formulas other than KL, in nats:
    kValue = 7,
    kMeanA = 8,  // the row's sums of flow_a and flow_b, see formulas.h
    kMeanB = 9,
    kRowBeta = 10,  // the beta of the row's flows, where they have one of their own: nla, lk
    kStats = 12,    // as kl_gpu/kinds.py has it: other backends keep more
};

enum class RowClass : int {
    all_finite = 0,  // every logit of the row is finite
    neg_inf = 1,     // -inf somewhere: some columns have no mass on one side or on both
    infinite = 2,    // b excludes a token that a allows: the value is +inf
    nan = 3,         // NaN or +inf somewhere, or a side with no mass at all
    zero = 4,        // one column: nothing can diverge
    masked = 5,      // -inf on both sides somewhere, in no column on one side alone
};

// What is asked of one side beside the divergence, [A*B] each: its entropy in nats, and its surprise
// -log q(label) with q at a temperature of its own. nullptr: not asked for.
struct Beside {
    bool of_a;
    double* entropies;
    const std::int64_t* labels;
    const double* label_scales;     // 1 / temperature of the surprise; nullptr: 1
    double* surprises;              // NaN for a label that is no column; 0 in rows that do not count
    const double* label_row_scale;  // what multiplies the surprise's gradient

    double label_scale(std::int64_t r) const { return label_scales == nullptr ? 1 : label_scales[r]; }
};

// Value and stats hold fp64 where `wide`, else fp32; [A*B] and [A*B, kStats], contiguous. Callers who want
// no gradient give nullptr for the stats.
void value(const RowPair&, bool wide, void* value, void* stats, const Beside* = nullptr);

// row_scale [A*B] in the stats' dtype. A gradient may be written over the logits it belongs to. With labels
// the side's gradient is that of both terms.
void gradient(const RowPair&, bool wide, const void* stats, const void* row_scale, const Gradient& to_a,
              const Gradient& to_b, const Beside* = nullptr);

// Both in one visit of each row, for callers who know row_scale beforehand: the second read of a row comes
// from cache.
void value_and_gradient(const RowPair&, bool wide, const void* row_scale, void* value, void* stats,
                        const Gradient& to_a, const Gradient& to_b, const Beside* = nullptr);

// What the terms and flows of the pair's formula add up to, fp64 [A*B, 3], 0 in rows that do not count. Of
// nla they are tv's terms and the two halves of alpha, of lk those of tv: a caller makes the row's numbers of
// them. The stats may be those of rows of which these columns are a part.
void formula_sums(const RowPair&, bool wide, const void* stats, double* out);

// Per row, a being the teacher: KL(a||b), KL(b||a), the entropies of b and of a, the log-probabilities of the
// row's token under b and under a, and whether both sides' first largest logit is in one column; nats.
constexpr int kTokenStats = 7;

// `out` is [kTokenStats, A*B], fp64 where `wide`, else fp32. tokens is [A*B], or nullptr; a token that is no
// column has log-probability NaN. A row that does not count is 0. The pair's formula plays no part. Where
// `sums` is given, fp64 [3, A*B], it gets what `formula_sums` has of the comparison, from cache; NaN in rows
// without a distribution.
void token_stats(const RowPair&, bool wide, const std::int64_t* tokens, void* out, double* sums);

// The instruction set in use, and all that this processor can run, best first, separated by commas.
const char* isa();
const char* supported_isas();

}  // namespace kl
