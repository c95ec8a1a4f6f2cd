// What value(), gradient() and their kin do with the rows of a pair of tensors; runtime/blocks.h shares them
// out.
#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "api.h"
#include "pair/layout.h"
#include "runtime/memory.h"
#include "pair/row.h"

namespace kl {
namespace {

template <class R>
void write(const RowResult& result, R* value, R* stats) {
    const auto split = [](double x, R* parts) {
        parts[0] = static_cast<R>(x);
        parts[1] = static_cast<R>(x - static_cast<double>(parts[0]));
    };
    *value = static_cast<R>(result.divergence);
    // What a formula leaves unused must be the same on every run too.
    std::fill_n(stats, static_cast<int>(kStats), R{0});
    split(result.lse_a, stats + kLseHi);
    split(result.shift, stats + kShiftHi);
    stats[kDivergence] = static_cast<R>(result.divergence);
    stats[kRowClass] = static_cast<R>(static_cast<int>(result.row_class));
    stats[kTopR] = static_cast<R>(result.top_r);
}

template <class R>
RowScalars read(const RowPair& p, const R* stats, R row_scale) {
    RowScalars s;
    s.lse_a = static_cast<double>(stats[kLseHi]) + static_cast<double>(stats[kLseLo]);
    s.shift = static_cast<double>(stats[kShiftHi]) + static_cast<double>(stats[kShiftLo]);
    s.lse_b = s.lse_a + s.shift;
    s.divergence = static_cast<double>(stats[kDivergence]);
    s.row_class = static_cast<RowClass>(static_cast<int>(stats[kRowClass]));
    s.top_r = static_cast<double>(stats[kTopR]);
    s.coefficient_a = static_cast<double>(row_scale) * p.a.scale;
    s.coefficient_b = static_cast<double>(row_scale) * p.b.scale;
    s.formula = p.formula;
    s.beta = p.beta;
    s.mean_a = static_cast<double>(stats[kMeanA]);
    s.mean_b = static_cast<double>(stats[kMeanB]);
    return s;
}

// From this divergence on the difference of two fp32 normalisers and a mean, each good to a few 1e-7, is
// precise enough.
constexpr double kApart = 0.5;

RowResult finalise_row(const Layout& layout, const Row& row, const State& state) {
    RowResult result = finish(state);
    if (!result.trusted) return layout.k.fallback(row);
    if (result.sums_b_too) {
        const SideResult b = layout.k.side(row.b, row.dtype_b, row.columns, row.scale_b());
        result.shift = b.m + b.log_z - result.lse_a;
        if (result.row_class == RowClass::infinite) return result;
        result.divergence = (result.shift - result.mean_d) / Row::kLog2e;
        // A difference of two fp32 normalisers says nothing of a small divergence.
        if (!(result.divergence > kApart)) return layout.k.fallback(row);
    }
    return result;
}

RowResult one_column(const Layout& layout, const Row& row) {
    RowResult result = layout.k.fallback(row);
    if (result.row_class != RowClass::nan) {
        result.divergence = 0;
        result.row_class = RowClass::zero;
    }
    return result;
}

}  // namespace

RowResult evaluate(const Layout& layout, const Row& row) {
    if (row.columns == 1) return one_column(layout, row);
    if (!row.fits_fp32()) return layout.k.fallback(row);
    State state;
    for (std::int64_t n = 0; n < layout.blocks(); ++n) state = merge(state, layout.block(row, n));
    return finalise_row(layout, row, state);
}

namespace {

template <class R>
void write_masked(R* value, R* stats) {
    *value = 0;
    std::fill_n(stats, static_cast<int>(kStats), R{0});
    stats[kRowClass] = static_cast<R>(static_cast<int>(RowClass::zero));
}

// The second sweep, of the formulas other than KL: `block(n)` gives the sums of a row's n-th block.
template <class R, class Block>
void write_formula(const Layout& layout, R* value, R* stats, Block block) {
    FormulaSums sums;
    for (std::int64_t n = 0; n < layout.blocks(); ++n) sums += block(n);
    // The comparison leaves a NaN as it is.
    *value = static_cast<R>(sums.value < 0 ? 0 : sums.value);
    stats[kValue] = *value;
    stats[kMeanA] = static_cast<R>(sums.mean_a);
    stats[kMeanB] = static_cast<R>(sums.mean_b);
}

// Both sweeps of a row, the second from cache.
template <class R>
void value_of_row(const Layout& layout, std::int64_t r, R* value, R* stats) {
    if (layout.is_valid(r))
        write(evaluate(layout, layout.row(r)), value, stats);
    else
        write_masked(value, stats);
    if (layout.p.formula == Formula::kl) return;
    const RowScalars scalars = read(layout.p, stats, R{1});
    write_formula(layout, value, stats,
                  [&](std::int64_t n) { return layout.formula_block(layout.row(r), scalars, n); });
}

template <class R>
void value_of(const RowPair& p, R* value, R* stats) {
    const Layout layout{p, kernels()};
    const bool fp32 = layout.rows() > 0 && layout.row(0).fits_fp32();
    if (layout.splits_rows() && fp32) {
        std::vector<State> states(static_cast<std::size_t>(layout.rows() * layout.blocks()));
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            if (layout.is_valid(r))
                states[static_cast<std::size_t>(r * layout.blocks() + n)] = layout.block(layout.row(r), n);
        });
        for_each_row(layout, [&](std::int64_t r) {
            if (!layout.is_valid(r)) return write_masked(value + r, stats + r * kStats);
            State state;
            for (std::int64_t n = 0; n < layout.blocks(); ++n)
                state = merge(state, states[static_cast<std::size_t>(r * layout.blocks() + n)]);
            write(finalise_row(layout, layout.row(r), state), value + r, stats + r * kStats);
        });
        if (p.formula == Formula::kl) return;
        std::vector<FormulaSums> sums(states.size());
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            sums[static_cast<std::size_t>(r * layout.blocks() + n)] =
                layout.formula_block(layout.row(r), read(p, stats + r * kStats, R{1}), n);
        });
        for (std::int64_t r = 0; r < layout.rows(); ++r)
            write_formula(layout, value + r, stats + r * kStats, [&](std::int64_t n) {
                return sums[static_cast<std::size_t>(r * layout.blocks() + n)];
            });
        return;
    }
    for_each_row(layout, [&](std::int64_t r) { value_of_row(layout, r, value + r, stats + r * kStats); });
}

bool any_non_temporal(const RowPair& p, const Gradient& to_a, const Gradient& to_b) {
    const bool a = uses_non_temporal_stores(to_a, p.a, p.size_a, p.size_b, p.columns);
    const bool b = uses_non_temporal_stores(to_b, p.b, p.size_a, p.size_b, p.columns);
    return a || b;
}

template <class R>
void gradient_of_row(const Layout& layout, std::int64_t r, const R* stats, R row_scale, const Gradient& to_a,
                     const Gradient& to_b, bool non_temporal, std::int64_t first, std::int64_t last) {
    RowScalars scalars = read(layout.p, stats, row_scale);
    if (!layout.is_valid(r)) {
        scalars = {};
        scalars.row_class = RowClass::zero;
    }
    layout.k.gradient(layout.row(r), scalars, layout.row_of(to_a, r), layout.row_of(to_b, r), first, last,
                      non_temporal);
}

template <class R>
void gradient_of(const RowPair& p, const R* stats, const R* row_scale, const Gradient& to_a,
                 const Gradient& to_b) {
    const Layout layout{p, kernels()};
    const bool non_temporal = any_non_temporal(p, to_a, to_b);
    if (layout.splits_rows()) {
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            gradient_of_row(layout, r, stats + r * kStats, row_scale[r], to_a, to_b, non_temporal,
                            layout.first(n), layout.last(n));
        });
        return;
    }
    for_each_row(layout, [&](std::int64_t r) {
        gradient_of_row(layout, r, stats + r * kStats, row_scale[r], to_a, to_b, non_temporal, 0, p.columns);
    });
}

template <class R>
void both_of(const RowPair& p, const R* row_scale, R* value, R* stats, const Gradient& to_a,
             const Gradient& to_b) {
    const Layout layout{p, kernels()};
    if (layout.splits_rows()) {
        value_of(p, value, stats);
        gradient_of(p, stats, row_scale, to_a, to_b);
        return;
    }
    const bool non_temporal = any_non_temporal(p, to_a, to_b);
    for_each_row(layout, [&](std::int64_t r) {
        R* const row_stats = stats + r * kStats;
        value_of_row(layout, r, value + r, row_stats);
        // From the last block to the first: the end of the row was read last and is in cache, while in
        // reading order a row a little larger than the cache would be gone before it is read again.
        for (std::int64_t n = layout.blocks() - 1; n >= 0; --n)
            gradient_of_row(layout, r, row_stats, row_scale[r], to_a, to_b, non_temporal, layout.first(n),
                            layout.last(n));
    });
}

template <class R>
void formula_sums_of(const RowPair& p, const R* stats, double* out) {
    const Layout layout{p, kernels()};
    const std::int64_t blocks = layout.blocks();
    const auto block = [&](std::int64_t r, std::int64_t n) {
        if (!layout.is_valid(r)) return FormulaSums{};
        return layout.formula_block(layout.row(r), read(p, stats + r * kStats, R{1}), n);
    };
    const auto write_row = [&](std::int64_t r, auto sums_of) {
        FormulaSums sums;
        for (std::int64_t n = 0; n < blocks; ++n) sums += sums_of(n);
        out[3 * r] = sums.value;
        out[3 * r + 1] = sums.mean_a;
        out[3 * r + 2] = sums.mean_b;
    };
    if (!layout.splits_rows())
        return for_each_row(
            layout, [&](std::int64_t r) { write_row(r, [&](std::int64_t n) { return block(r, n); }); });
    std::vector<FormulaSums> sums(static_cast<std::size_t>(layout.rows() * blocks));
    const auto at = [&](std::int64_t r, std::int64_t n) { return static_cast<std::size_t>(r * blocks + n); };
    for_each_block(layout, [&](std::int64_t r, std::int64_t n) { sums[at(r, n)] = block(r, n); });
    for (std::int64_t r = 0; r < layout.rows(); ++r)
        write_row(r, [&](std::int64_t n) { return sums[at(r, n)]; });
}

}  // namespace

Formula formula_named(const char* name) {
    const std::string_view wanted(name);
    std::string known = "kl";
    if (wanted == known) return Formula::kl;
#define X(formula)                                   \
    if (wanted == #formula) return Formula::formula; \
    known += ", " #formula;
    KL_FORMULAS(X)
#undef X
    throw std::invalid_argument("formula " + std::string(wanted) + ": the native kernels have " + known);
}

void formula_sums(const RowPair& p, bool wide, const void* stats, double* out) {
    if (p.formula == Formula::kl) throw std::invalid_argument("formula_sums: KL(a||b) has no formula pass");
    if (wide)
        formula_sums_of(p, static_cast<const double*>(stats), out);
    else
        formula_sums_of(p, static_cast<const float*>(stats), out);
}

namespace {

template <class R>
void value_or_both(const RowPair& p, R* value, R* stats) {
    if (stats != nullptr) return value_of(p, value, stats);
    // The formulas' second sweep reads what the first one wrote there.
    const std::unique_ptr<R[]> own(new R[static_cast<std::size_t>(p.size_a * p.size_b * kStats)]);
    value_of(p, value, own.get());
}

}  // namespace

void value(const RowPair& p, bool wide, void* value, void* stats) {
    if (wide)
        value_or_both(p, static_cast<double*>(value), static_cast<double*>(stats));
    else
        value_or_both(p, static_cast<float*>(value), static_cast<float*>(stats));
}

void gradient(const RowPair& p, bool wide, const void* stats, const void* row_scale, const Gradient& to_a,
              const Gradient& to_b) {
    if (wide)
        gradient_of(p, static_cast<const double*>(stats), static_cast<const double*>(row_scale), to_a, to_b);
    else
        gradient_of(p, static_cast<const float*>(stats), static_cast<const float*>(row_scale), to_a, to_b);
}

void value_and_gradient(const RowPair& p, bool wide, const void* row_scale, void* value, void* stats,
                        const Gradient& to_a, const Gradient& to_b) {
    if (wide)
        both_of(p, static_cast<const double*>(row_scale), static_cast<double*>(value),
                static_cast<double*>(stats), to_a, to_b);
    else
        both_of(p, static_cast<const float*>(row_scale), static_cast<float*>(value),
                static_cast<float*>(stats), to_a, to_b);
}

}  // namespace kl
