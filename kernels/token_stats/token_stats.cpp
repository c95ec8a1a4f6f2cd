// Statistics of both sides, row by row. A row is folded from the same blocks in the same order however many
// threads there are, as in pair/divergence.cpp.
#include <cmath>
#include <limits>
#include <vector>

#include "api.h"
#include "pair/layout.h"
#include "token_stats/state.h"

namespace kl {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// One side of a finished row, exponents in units of ln 2: lse = m + log_z.
struct Side {
    const void* logits;
    Dtype dtype;
    double scale, m, log_z, entropy;

    double log_probability(const Layout& layout, std::int64_t token) const {
        if (token < 0 || token >= layout.p.columns) return kNan;
        // The small numbers are subtracted first: an m of a million would swallow log2 z.
        const double log_p = kLn2 * ((layout.k.logit(logits, dtype, token) * scale - m) - log_z);
        return log_p > 0 ? 0 : log_p;
    }
};

struct RowStats {
    double forward, reverse;
    Side a, b;
    double agree;  // 1, 0 or NaN
};

Row swapped(const Row& r) {
    return {r.b, r.a, r.dtype_b, r.dtype_a, r.inverse_temperature_b, r.inverse_temperature_a, r.columns};
}

// Each KL by the path that its logits take in `value`, the rest from each side by itself.
RowStats run_fallback(const Layout& layout, const Row& row) {
    const SideResult a = layout.k.side(row.a, row.dtype_a, row.columns, row.scale_a());
    const SideResult b = layout.k.side(row.b, row.dtype_b, row.columns, row.scale_b());
    return {evaluate(layout, row).divergence,
            evaluate(layout, swapped(row)).divergence,
            {row.a, row.dtype_a, row.scale_a(), a.m, a.log_z, a.entropy},
            {row.b, row.dtype_b, row.scale_b(), b.m, b.log_z, b.entropy},
            a.top < 0 || b.top < 0 ? kNan : static_cast<double>(a.top == b.top)};
}

bool agree(const Layout& layout, const Row& row, const Top& a, const Top& b) {
    if (a.first != b.first || a.columns != b.columns) return false;
    return layout.k.find(row.a, row.dtype_a, a.first, a.columns, a.logit) ==
           layout.k.find(row.b, row.dtype_b, b.first, b.columns, b.logit);
}

RowStats finalise_row(const Layout& layout, const Row& row, const PairState& state) {
    const PairResult r = finish(state);
    if (!r.trusted) return run_fallback(layout, row);
    const double m = state.reference.m, m_b = m + static_cast<double>(state.reference.c);
    return {r.forward,
            r.reverse,
            {row.a, row.dtype_a, row.scale_a(), m, r.lse_a - m, r.entropy_a},
            {row.b, row.dtype_b, row.scale_b(), m_b, r.lse_b - m_b, r.entropy_b},
            agree(layout, row, state.top_a, state.top_b) ? 1.0 : 0.0};
}

bool takes_fast_path(const Row& row) { return row.columns > 1 && row.fits_fp32(); }

PairState block(const Layout& layout, const Row& row, std::int64_t n) {
    return layout.k.sweep_pair_block(row, layout.first(n), layout.last(n));
}

template <class StateOf>
RowStats evaluate(const Layout& layout, const Row& row, StateOf state_of) {
    if (!takes_fast_path(row)) return run_fallback(layout, row);
    PairState state;
    for (std::int64_t n = 0; n < layout.blocks() && state.usable; ++n) state = merge(state, state_of(n));
    return finalise_row(layout, row, state);
}

}  // namespace

void token_stats(const RowPair& p, bool wide, const std::int64_t* tokens, void* out) {
    const Layout layout{p, kernels()};
    const bool split = layout.splits_rows() && layout.rows() > 0 && takes_fast_path(layout.row(0));
    in_compute_type(wide, [&]<class R>() {
        fold_blocks(
            layout, split, [&](std::int64_t r, std::int64_t n) { return block(layout, layout.row(r), n); },
            [&](std::int64_t r, auto state_of) {
                double all[kTokenStats] = {};
                if (layout.is_valid(r)) {
                    const RowStats s = evaluate(layout, layout.row(r), state_of);
                    const std::int64_t token = tokens == nullptr ? -1 : tokens[r];
                    const double found[kTokenStats] = {s.forward,
                                                       s.reverse,
                                                       s.b.entropy,
                                                       s.a.entropy,
                                                       s.b.log_probability(layout, token),
                                                       s.a.log_probability(layout, token),
                                                       s.agree};
                    std::copy_n(found, kTokenStats, all);
                }
                for (int i = 0; i < kTokenStats; ++i)
                    static_cast<R*>(out)[i * layout.rows() + r] = static_cast<R>(all[i]);
            });
    });
}

}  // namespace kl
