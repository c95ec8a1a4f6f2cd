// Who does which part of a problem: rows over threads, and where there are fewer rows than threads,
// blocks of a row over threads. A row's state is folded from the same blocks in the same order either
// way, so its bits depend on nothing but the row.
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "contract.h"
#include "layout.h"
#include "pages.h"
#include "row.h"

namespace kl {
namespace {

template <class R>
void write(const RowResult& result, R* value, R* stats) {
    const auto split = [](double x, R* parts) {
        parts[0] = static_cast<R>(x);
        parts[1] = static_cast<R>(x - static_cast<double>(parts[0]));
    };
    *value = static_cast<R>(result.divergence);
    // What a family leaves unused must be the same on every run too.
    std::fill_n(stats, static_cast<int>(kStats), R{0});
    split(result.lse_a, stats + kLseHi);
    split(result.shift, stats + kShiftHi);
    stats[kDivergence] = static_cast<R>(result.divergence);
    stats[kVerdict] = static_cast<R>(static_cast<int>(result.verdict));
    stats[kTopR] = static_cast<R>(result.top_r);
}

template <class R>
RowScalars read(const Problem& p, const R* stats, R row_scale) {
    RowScalars s;
    s.lse_a = static_cast<double>(stats[kLseHi]) + static_cast<double>(stats[kLseLo]);
    s.shift = static_cast<double>(stats[kShiftHi]) + static_cast<double>(stats[kShiftLo]);
    s.lse_b = s.lse_a + s.shift;
    s.divergence = static_cast<double>(stats[kDivergence]);
    s.verdict = static_cast<Verdict>(static_cast<int>(stats[kVerdict]));
    s.top_r = static_cast<double>(stats[kTopR]);
    s.coefficient_a = static_cast<double>(row_scale) * p.a.scale;
    s.coefficient_b = static_cast<double>(row_scale) * p.b.scale;
    s.family = p.family;
    s.beta = p.beta;
    s.mean_a = static_cast<double>(stats[kMeanA]);
    s.mean_b = static_cast<double>(stats[kMeanB]);
    return s;
}

// What the difference of two fp32 normalisers and a mean, each good to a few 1e-7, leaves within the promise.
constexpr double kApart = 0.5;

RowResult settle(const Layout& layout, const Row& row, const State& state) {
    RowResult result = finish(state);
    if (!result.trusted) return layout.k.careful(row);
    if (result.sums_b_too) {
        const SideResult b = layout.k.side(row.b, row.dtype_b, row.columns, row.scale_b());
        result.shift = b.m + b.log_z - result.lse_a;
        if (result.verdict == Verdict::infinite) return result;
        result.divergence = (result.shift - result.mean_d) / Row::kLog2e;
        if (!(result.divergence > kApart)) return layout.k.careful(row);
    }
    return result;
}

RowResult one_column(const Layout& layout, const Row& row) {
    RowResult result = layout.k.careful(row);
    if (result.verdict != Verdict::nan) {
        result.divergence = 0;
        result.verdict = Verdict::zero;
    }
    return result;
}

}  // namespace

RowResult look_at(const Layout& layout, const Row& row) {
    if (row.columns == 1) return one_column(layout, row);
    if (!row.fits_fp32()) return layout.k.careful(row);
    State state;
    for (std::int64_t n = 0; n < layout.blocks(); ++n) state = merge(state, layout.block(row, n));
    return settle(layout, row, state);
}

namespace {

template <class R>
void write_masked(R* value, R* stats) {
    *value = 0;
    std::fill_n(stats, static_cast<int>(kStats), R{0});
    stats[kVerdict] = static_cast<R>(static_cast<int>(Verdict::zero));
}

// The second sweep, of the families other than KL: `block(n)` gives the sums of a row's n-th block.
template <class R, class Block>
void write_family(const Layout& layout, R* value, R* stats, Block block) {
    FamilySums sums;
    for (std::int64_t n = 0; n < layout.blocks(); ++n) sums += block(n);
    // A NaN stays one.
    *value = static_cast<R>(sums.value < 0 ? 0 : sums.value);
    stats[kValue] = *value;
    stats[kMeanA] = static_cast<R>(sums.mean_a);
    stats[kMeanB] = static_cast<R>(sums.mean_b);
}

// Both sweeps of a row, the second from cache.
template <class R>
void value_of_row(const Layout& layout, std::int64_t r, R* value, R* stats) {
    if (layout.counts(r))
        write(look_at(layout, layout.row(r)), value, stats);
    else
        write_masked(value, stats);
    if (layout.p.family == Family::kl) return;
    const RowScalars scalars = read(layout.p, stats, R{1});
    write_family(layout, value, stats,
                 [&](std::int64_t n) { return layout.family_block(layout.row(r), scalars, n); });
}

template <class R>
void value_of(const Problem& p, R* value, R* stats) {
    const Layout layout{p, kernels()};
    const bool fp32 = layout.rows() > 0 && layout.row(0).fits_fp32();
    if (layout.splits_rows() && fp32) {
        std::vector<State> states(static_cast<std::size_t>(layout.rows() * layout.blocks()));
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            if (layout.counts(r))
                states[static_cast<std::size_t>(r * layout.blocks() + n)] = layout.block(layout.row(r), n);
        });
        for_each_row(layout, [&](std::int64_t r) {
            if (!layout.counts(r)) return write_masked(value + r, stats + r * kStats);
            State state;
            for (std::int64_t n = 0; n < layout.blocks(); ++n)
                state = merge(state, states[static_cast<std::size_t>(r * layout.blocks() + n)]);
            write(settle(layout, layout.row(r), state), value + r, stats + r * kStats);
        });
        if (p.family == Family::kl) return;
        std::vector<FamilySums> sums(states.size());
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            sums[static_cast<std::size_t>(r * layout.blocks() + n)] =
                layout.family_block(layout.row(r), read(p, stats + r * kStats, R{1}), n);
        });
        for (std::int64_t r = 0; r < layout.rows(); ++r)
            write_family(layout, value + r, stats + r * kStats, [&](std::int64_t n) {
                return sums[static_cast<std::size_t>(r * layout.blocks() + n)];
            });
        return;
    }
    for_each_row(layout, [&](std::int64_t r) { value_of_row(layout, r, value + r, stats + r * kStats); });
}

bool any_past_cache(const Problem& p, const Gradient& to_a, const Gradient& to_b) {
    const bool a = stores_past_cache(to_a, p.a, p.size_a, p.size_b, p.columns);
    const bool b = stores_past_cache(to_b, p.b, p.size_a, p.size_b, p.columns);
    return a || b;
}

template <class R>
void gradient_of_row(const Layout& layout, std::int64_t r, const R* stats, R row_scale, const Gradient& to_a,
                     const Gradient& to_b, bool stream, std::int64_t first, std::int64_t last) {
    RowScalars scalars = read(layout.p, stats, row_scale);
    if (!layout.counts(r)) {
        scalars = {};
        scalars.verdict = Verdict::zero;
    }
    layout.k.gradient(layout.row(r), scalars, layout.to(to_a, r), layout.to(to_b, r), first, last, stream);
}

template <class R>
void gradient_of(const Problem& p, const R* stats, const R* row_scale, const Gradient& to_a,
                 const Gradient& to_b) {
    const Layout layout{p, kernels()};
    const bool stream = any_past_cache(p, to_a, to_b);
    if (layout.splits_rows()) {
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            gradient_of_row(layout, r, stats + r * kStats, row_scale[r], to_a, to_b, stream,
                            n * layout.k.block, std::min(p.columns, (n + 1) * layout.k.block));
        });
        return;
    }
    for_each_row(layout, [&](std::int64_t r) {
        gradient_of_row(layout, r, stats + r * kStats, row_scale[r], to_a, to_b, stream, 0, p.columns);
    });
}

template <class R>
void both_of(const Problem& p, const R* row_scale, R* value, R* stats, const Gradient& to_a,
             const Gradient& to_b) {
    const Layout layout{p, kernels()};
    if (layout.splits_rows()) {
        value_of(p, value, stats);
        gradient_of(p, stats, row_scale, to_a, to_b);
        return;
    }
    const bool stream = any_past_cache(p, to_a, to_b);
    for_each_row(layout, [&](std::int64_t r) {
        R* const row_stats = stats + r * kStats;
        value_of_row(layout, r, value + r, row_stats);
        // From the last block to the first: the end of the row was read last and is in cache, while in
        // reading order a row a little larger than the cache would be gone before it is read again.
        for (std::int64_t n = layout.blocks() - 1; n >= 0; --n)
            gradient_of_row(layout, r, row_stats, row_scale[r], to_a, to_b, stream, n * layout.k.block,
                            std::min(p.columns, (n + 1) * layout.k.block));
    });
}

template <class R>
void formula_sums_of(const Problem& p, const R* stats, double* out) {
    const Layout layout{p, kernels()};
    const std::int64_t blocks = layout.blocks();
    const auto block = [&](std::int64_t r, std::int64_t n) {
        if (!layout.counts(r)) return FamilySums{};
        return layout.family_block(layout.row(r), read(p, stats + r * kStats, R{1}), n);
    };
    const auto write_row = [&](std::int64_t r, auto sums_of) {
        FamilySums sums;
        for (std::int64_t n = 0; n < blocks; ++n) sums += sums_of(n);
        out[3 * r] = sums.value;
        out[3 * r + 1] = sums.mean_a;
        out[3 * r + 2] = sums.mean_b;
    };
    if (!layout.splits_rows())
        return for_each_row(
            layout, [&](std::int64_t r) { write_row(r, [&](std::int64_t n) { return block(r, n); }); });
    std::vector<FamilySums> sums(static_cast<std::size_t>(layout.rows() * blocks));
    const auto at = [&](std::int64_t r, std::int64_t n) { return static_cast<std::size_t>(r * blocks + n); };
    for_each_block(layout, [&](std::int64_t r, std::int64_t n) { sums[at(r, n)] = block(r, n); });
    for (std::int64_t r = 0; r < layout.rows(); ++r)
        write_row(r, [&](std::int64_t n) { return sums[at(r, n)]; });
}

}  // namespace

void formula_sums(const Problem& p, bool wide, const void* stats, double* out) {
    if (wide)
        formula_sums_of(p, static_cast<const double*>(stats), out);
    else
        formula_sums_of(p, static_cast<const float*>(stats), out);
}

namespace {

template <class R>
void value_or_both(const Problem& p, R* value, R* stats) {
    if (stats != nullptr) return value_of(p, value, stats);
    // The families' second sweep reads what the first one wrote there.
    const std::unique_ptr<R[]> own(new R[static_cast<std::size_t>(p.size_a * p.size_b * kStats)]);
    value_of(p, value, own.get());
}

}  // namespace

void value(const Problem& p, bool wide, void* value, void* stats) {
    if (wide)
        value_or_both(p, static_cast<double*>(value), static_cast<double*>(stats));
    else
        value_or_both(p, static_cast<float*>(value), static_cast<float*>(stats));
}

void gradient(const Problem& p, bool wide, const void* stats, const void* row_scale, const Gradient& to_a,
              const Gradient& to_b) {
    if (wide)
        gradient_of(p, static_cast<const double*>(stats), static_cast<const double*>(row_scale), to_a, to_b);
    else
        gradient_of(p, static_cast<const float*>(stats), static_cast<const float*>(row_scale), to_a, to_b);
}

void value_and_gradient(const Problem& p, bool wide, const void* row_scale, void* value, void* stats,
                        const Gradient& to_a, const Gradient& to_b) {
    if (wide)
        both_of(p, static_cast<const double*>(row_scale), static_cast<double*>(value),
                static_cast<double*>(stats), to_a, to_b);
    else
        both_of(p, static_cast<const float*>(row_scale), static_cast<float*>(value),
                static_cast<float*>(stats), to_a, to_b);
}

}  // namespace kl
