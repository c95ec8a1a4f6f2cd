// What token_stats() does with the rows of a pair of tensors.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "api.h"
#include "pair/layout.h"
#include "testing/slow_rows.h"
#include "token_stats/state.h"

namespace kl {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct RowStats {
    double forward, reverse;
    SideResult a, b;
    double agree;         // 1, 0 or NaN
    RowScalars compared;  // what the sums of the comparison start from
};

RowScalars compared(double lse_a, double shift, double divergence, RowClass row_class, double top_r) {
    return {lse_a, lse_a + shift, shift, divergence, top_r, row_class, 0, 0, Formula::comparison, 0, 0, 0};
}

Row swapped(const Row& r) {
    return {r.b, r.a, r.dtype_b, r.dtype_a, r.inverse_temperature_b, r.inverse_temperature_a, r.columns};
}

// Each KL by the path that its logits take in `value`, the rest from each side by itself.
RowStats run_fallback(const Layout& layout, const Row& row) {
    const SideResult a = layout.k.side(row.a, row.dtype_a, row.columns, row.scale_a());
    const SideResult b = layout.k.side(row.b, row.dtype_b, row.columns, row.scale_b());
    const double same = a.top < 0 || b.top < 0 ? kNan : static_cast<double>(a.top == b.top);
    const RowResult r = evaluate(layout, row);
    return {r.divergence,
            evaluate(layout, swapped(row)).divergence,
            a,
            b,
            same,
            compared(r.lse_a, r.shift, r.divergence, r.row_class, r.top_r)};
}

bool agree(const Layout& layout, const Row& row, const Top& a, const Top& b) {
    if (a.first != b.first || a.columns != b.columns) return false;
    return layout.k.find(row.a, row.dtype_a, a.first, a.columns, a.logit) ==
           layout.k.find(row.b, row.dtype_b, b.first, b.columns, b.logit);
}

RowStats finalise_row(const Layout& layout, const Row& row, const PairState& state) {
    const PairResult r = finish(state);
    if (!r.trusted) ++slow_rows;
    if (!r.trusted) return run_fallback(layout, row);
    const double m = state.reference.m, m_b = m + static_cast<double>(state.reference.c);
    const double same = agree(layout, row, state.top_a, state.top_b) ? 1.0 : 0.0;
    // Of finite logits no x is past 32, and a column that both lack is none.
    const RowClass row_class = (state.flags & kSawInfinite) ? RowClass::neg_inf : RowClass::masked;
    return {r.forward,
            r.reverse,
            {m, r.lse_a - m, r.entropy_a},
            {m_b, r.lse_b - m_b, r.entropy_b},
            same,
            compared(r.lse_a, r.shift, std::min(r.forward, r.reverse), row_class, 32)};
}

// Below a temperature of 1 the largest logit may be past fp64.
double finite(double x) {
    constexpr double most = std::numeric_limits<double>::max();
    return std::min(std::max(x, -most), most);
}

// Of a token, from its logit as memory holds it.
double log_probability(const SideResult& side, double logit, double scale) {
    const double product = std::isinf(logit) ? logit : finite(logit * scale);
    // The small numbers are subtracted first: an m of a million would swallow log2 z.
    const double log_p = kLn2 * ((product - finite(side.m)) - side.log_z);
    return log_p > 0 ? 0 : log_p;
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

void token_stats(const RowPair& p, bool wide, const std::int64_t* tokens, void* out, double* sums) {
    const Layout layout{p, kernels()};
    const bool split = layout.splits_rows() && layout.rows() > 0 && takes_fast_path(layout.row(0));
    const auto compared_block = [&](std::int64_t r, const RowScalars& of, std::int64_t n) {
        return layout.formula_block(layout.row(r), of, n);
    };
    // From the last block to the first, whose columns have been in cache longest.
    const auto write_sums = [&](std::int64_t r, auto sums_of) {
        FormulaSums of_row;
        for (std::int64_t n = layout.blocks() - 1; n >= 0; --n) of_row += sums_of(n);
        sums[r] = of_row.value;
        sums[layout.rows() + r] = of_row.mean_a;
        sums[2 * layout.rows() + r] = of_row.mean_b;
    };
    // Where blocks of a row are shared out, of all rows until every first read is done.
    std::vector<RowScalars> scalars(sums != nullptr && split ? static_cast<std::size_t>(layout.rows()) : 0);
    in_compute_type(wide, [&]<class R>() {
        fold_blocks(
            layout, split, [&](std::int64_t r, std::int64_t n) { return block(layout, layout.row(r), n); },
            [&](std::int64_t r, auto state_of) {
                std::array<double, kTokenStats> all{};
                RowScalars of_sums{};
                of_sums.row_class = RowClass::zero;
                const bool valid = layout.is_valid(r);
                const Row row = layout.row(r);
                if (valid && !row.has_temperature()) {
                    all.fill(kNan);
                    of_sums.row_class = RowClass::nan;
                } else if (valid) {
                    const RowStats s = evaluate(layout, row, state_of);
                    const std::int64_t token = tokens == nullptr ? -1 : tokens[r];
                    double token_b = kNan, token_a = kNan;
                    if (token >= 0 && token < p.columns) {
                        token_b =
                            log_probability(s.b, layout.k.logit(row.b, row.dtype_b, token), row.scale_b());
                        token_a =
                            log_probability(s.a, layout.k.logit(row.a, row.dtype_a, token), row.scale_a());
                    }
                    of_sums = s.compared;
                    all = {s.forward, s.reverse, s.b.entropy, s.a.entropy, token_b, token_a, s.agree};
                }
                for (int i = 0; i < kTokenStats; ++i)
                    static_cast<R*>(out)[i * layout.rows() + r] =
                        static_cast<R>(all[static_cast<std::size_t>(i)]);
                if (!scalars.empty())
                    scalars[static_cast<std::size_t>(r)] = of_sums;
                else if (sums != nullptr)
                    write_sums(r, [&](std::int64_t n) { return compared_block(r, of_sums, n); });
            });
    });
    if (scalars.empty()) return;
    fold_blocks(
        layout, true,
        [&](std::int64_t r, std::int64_t n) {
            return compared_block(r, scalars[static_cast<std::size_t>(r)], n);
        },
        [&](std::int64_t r, auto sums_of) { write_sums(r, sums_of); });
}

}  // namespace kl
