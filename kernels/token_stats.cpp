// Statistics of both sides, row by row. As in engine.cpp a row is folded from the same blocks in the same
// order however many threads there are.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "contract.h"
#include "layout.h"
#include "pair_state.h"

namespace kl {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// One side of a finished row, exponents in units of ln 2: lse = m + log_z.
struct Side {
    const void* logits;
    Dtype dtype;
    double scale, m, log_z, entropy;

    // Below a temperature of 1 the largest logit may be past fp64.
    static double finite(double x) {
        constexpr double most = std::numeric_limits<double>::max();
        return std::min(std::max(x, -most), most);
    }
    static double product(double logit, double scale) {
        return std::isinf(logit) ? logit : finite(logit * scale);
    }

    double log_probability(const Layout& layout, std::int64_t token) const {
        if (token < 0 || token >= layout.p.columns) return kNan;
        const double logit = layout.k.logit(logits, dtype, token);
        // Small numbers first: log2 z would be lost in an m of a million.
        const double found = kLn2 * ((product(logit, scale) - finite(m)) - log_z);
        return found > 0 ? 0 : found;
    }
};

struct Found {
    double forward, reverse;
    Side a, b;
    double agree;  // 1, 0 or NaN
};

Row swapped(const Row& r) {
    return {r.b, r.a, r.dtype_b, r.dtype_a, r.inverse_temperature_b, r.inverse_temperature_a, r.columns};
}

// Each KL by the path that its logits take in `value`, the rest in fp64.
Found look_carefully(const Layout& layout, const Row& row) {
    const SideResult a = layout.k.side(row.a, row.dtype_a, row.columns, row.scale_a());
    const SideResult b = layout.k.side(row.b, row.dtype_b, row.columns, row.scale_b());
    return {look_at(layout, row).divergence,
            look_at(layout, swapped(row)).divergence,
            {row.a, row.dtype_a, row.scale_a(), a.m, a.log_z, a.entropy},
            {row.b, row.dtype_b, row.scale_b(), b.m, b.log_z, b.entropy},
            a.top < 0 || b.top < 0 ? kNan : static_cast<double>(a.top == b.top)};
}

bool agree(const Layout& layout, const Row& row, const Top& a, const Top& b) {
    if (a.first != b.first || a.columns != b.columns) return false;
    return layout.k.find(row.a, row.dtype_a, a.first, a.columns, a.logit) ==
           layout.k.find(row.b, row.dtype_b, b.first, b.columns, b.logit);
}

Found settle(const Layout& layout, const Row& row, const PairState& state) {
    const PairResult r = finish(state);
    if (!r.trusted) return look_carefully(layout, row);
    const double m = state.frame.m, m_b = m + static_cast<double>(state.frame.c);
    return {r.forward,
            r.reverse,
            {row.a, row.dtype_a, row.scale_a(), m, r.lse_a - m, r.entropy_a},
            {row.b, row.dtype_b, row.scale_b(), m_b, r.lse_b - m_b, r.entropy_b},
            agree(layout, row, state.top_a, state.top_b) ? 1.0 : 0.0};
}

bool takes_fast_sweep(const Row& row) { return row.columns > 1 && row.fits_fp32(); }

PairState block(const Layout& layout, const Row& row, std::int64_t n) {
    return layout.k.collect_pair(row, n * layout.k.block, std::min(row.columns, (n + 1) * layout.k.block));
}

Found look(const Layout& layout, const Row& row) {
    if (!takes_fast_sweep(row)) return look_carefully(layout, row);
    PairState state;
    for (std::int64_t n = 0; n < layout.blocks() && state.usable; ++n)
        state = merge(state, block(layout, row, n));
    return settle(layout, row, state);
}

template <class R>
void write(const Layout& layout, std::int64_t r, const Found& f, const std::int64_t* tokens, R* out) {
    const std::int64_t token = tokens == nullptr ? -1 : tokens[r];
    const double all[kTokenStats] = {f.forward,
                                     f.reverse,
                                     f.b.entropy,
                                     f.a.entropy,
                                     f.b.log_probability(layout, token),
                                     f.a.log_probability(layout, token),
                                     f.agree};
    for (int i = 0; i < kTokenStats; ++i) out[i * layout.rows() + r] = static_cast<R>(all[i]);
}

template <class R>
void write_masked(const Layout& layout, std::int64_t r, R* out) {
    for (int i = 0; i < kTokenStats; ++i) out[i * layout.rows() + r] = 0;
}

template <class R>
void token_stats_of(const Problem& p, const std::int64_t* tokens, R* out) {
    const Layout layout{p, kernels()};
    if (!(layout.splits_rows() && layout.rows() > 0 && takes_fast_sweep(layout.row(0)))) {
        for_each_row(layout, [&](std::int64_t r) {
            if (layout.counts(r))
                write(layout, r, look(layout, layout.row(r)), tokens, out);
            else
                write_masked(layout, r, out);
        });
        return;
    }
    std::vector<PairState> states(static_cast<std::size_t>(layout.rows() * layout.blocks()));
    const auto state = [&](std::int64_t r, std::int64_t n) -> PairState& {
        return states[static_cast<std::size_t>(r * layout.blocks() + n)];
    };
    for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
        if (layout.counts(r)) state(r, n) = block(layout, layout.row(r), n);
    });
    for_each_row(layout, [&](std::int64_t r) {
        if (!layout.counts(r)) return write_masked(layout, r, out);
        PairState whole;
        for (std::int64_t n = 0; n < layout.blocks() && whole.usable; ++n) whole = merge(whole, state(r, n));
        write(layout, r, settle(layout, layout.row(r), whole), tokens, out);
    });
}

}  // namespace

void token_stats(const Problem& p, bool wide, const std::int64_t* tokens, void* out) {
    if (wide)
        token_stats_of(p, tokens, static_cast<double*>(out));
    else
        token_stats_of(p, tokens, static_cast<float*>(out));
}

}  // namespace kl
