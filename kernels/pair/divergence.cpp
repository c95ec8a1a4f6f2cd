// What value(), gradient() and the like do with a pair's rows; runtime/blocks.h shares them out.
#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "pair/beside.h"
#include "runtime/memory.h"
#include "testing/slow_rows.h"

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
RowScalars read(const RowPair& p, std::int64_t r, const R* stats, R row_scale) {
    RowScalars s;
    s.lse_a = static_cast<double>(stats[kLseHi]) + static_cast<double>(stats[kLseLo]);
    s.shift = static_cast<double>(stats[kShiftHi]) + static_cast<double>(stats[kShiftLo]);
    s.lse_b = s.lse_a + s.shift;
    s.divergence = static_cast<double>(stats[kDivergence]);
    s.row_class = static_cast<RowClass>(static_cast<int>(stats[kRowClass]));
    s.top_r = static_cast<double>(stats[kTopR]);
    s.coefficient_a = static_cast<double>(row_scale) * p.a_scale(r);
    s.coefficient_b = static_cast<double>(row_scale) * p.b_scale(r);
    s.formula = p.formula;
    const bool of_row = p.formula == Formula::nla || p.formula == Formula::lk;
    s.beta = of_row ? static_cast<double>(stats[kRowBeta]) : p.beta;
    s.mean_a = static_cast<double>(stats[kMeanA]);
    s.mean_b = static_cast<double>(stats[kMeanB]);
    return s;
}

RowResult finalise_row(const Layout& layout, const Row& row, const State& state) {
    const RowResult result = finish(state);
    if (result.trusted && !(result.coarse_shift && layout.p.formula != Formula::kl)) return result;
    ++slow_rows;
    return layout.k.fallback(row);
}

RowResult one_column(const Layout& layout, const Row& row) {
    RowResult result = layout.k.fallback(row);
    if (result.row_class != RowClass::nan) {
        result.divergence = 0;
        result.row_class = RowClass::zero;
    }
    return result;
}

// `kept` gets the blocks' states where it is given and they are all that the result comes from.
template <class StateOf>
RowResult evaluate(const Layout& layout, const Row& row, StateOf state_of,
                   std::vector<State>* kept = nullptr) {
    if (!row.has_temperature()) return nan_result();
    if (row.columns == 1) return one_column(layout, row);
    if (!row.fits_fp32()) return layout.k.fallback(row);
    State state;
    for (std::int64_t n = 0; n < layout.blocks(); ++n) {
        const State block = state_of(n);
        if (kept != nullptr) kept->push_back(block);
        state = merge(state, block);
    }
    return finalise_row(layout, row, state);
}

// The sums of a row's blocks, from the first to the last.
template <class SumsOf>
FormulaSums total(const Layout& layout, SumsOf sums_of) {
    FormulaSums sums;
    for (std::int64_t n = 0; n < layout.blocks(); ++n) sums += sums_of(n);
    return sums;
}

// A row's value, what its flows sum to, and the beta of its flows.
struct FormulaRowNumbers {
    double value, mean_a, mean_b, beta;
};

// From what Sums of the formula adds up to, as kl_gpu/formulas.py has it.
FormulaRowNumbers row_numbers(const RowPair& p, double kl, const FormulaSums& s) {
    if (p.formula == Formula::nla) {
        // From 1 - alpha where alpha is near 1, and from alpha where it is small. Equal rows have flows of 0.
        const double alpha = s.mean_a + s.mean_b, inverse = s.value == 0 ? 0 : 1 / alpha;
        const double value = s.value <= 0.5 ? -std::log1p(-s.value) : -std::log(alpha);
        return {value, -s.mean_a * inverse, -s.mean_b * inverse, -inverse / kNlaScale};
    }
    if (p.formula == Formula::lk) {
        const double alpha = s.value > 1 ? 0 : 1 - s.value, weight = std::exp(-p.beta * alpha);
        const double rest = 1 - weight;
        return {weight * kl + rest * s.value, weight * kl + rest * s.mean_a, rest * s.mean_b, weight};
    }
    return {s.value, s.mean_a, s.mean_b, 0};
}

// The two sweeps of value() and what each leaves in a row's value and stats.
template <class R>
struct Value {
    const Layout& layout;
    R *value, *stats;
    const Beside* beside;

    State kl_block(std::int64_t r, std::int64_t n) const { return layout.block(layout.row(r), n); }
    FormulaSums formula_block(std::int64_t r, std::int64_t n) const {
        return layout.formula_block(layout.row(r), read(layout.p, r, stats + r * kStats, R{1}), n);
    }
    // Whether r is large in no column but those that one side lacks, for formulas that multiply by it: the
    // sums do not tell the two apart.
    bool may_be_near(std::int64_t r, const RowResult& found) const {
        const bool lacks = found.row_class == RowClass::neg_inf || found.row_class == RowClass::infinite,
                   uses_r = layout.p.formula == Formula::jeffreys || layout.p.formula == Formula::lk;
        const Row row = layout.row(r);
        return uses_r && lacks && !(found.top_r < kMostR) && row.fits_fp32() &&
               !layout.k.has_far_column(row, found.shift);
    }
    template <class StateOf>
    void finish_kl(std::int64_t r, StateOf state_of) const {
        std::vector<State> states;
        const bool keeps = beside != nullptr && needs_states(layout, *beside, r);
        RowResult found;
        R* const row_stats = stats + r * kStats;
        if (layout.is_valid(r)) {
            found = evaluate(layout, layout.row(r), state_of, keeps ? &states : nullptr);
            write(found, value + r, row_stats);
            if (may_be_near(r, found)) row_stats[kTopR] = static_cast<R>(kMostR / 2);
        }
        if (beside != nullptr) write_beside(layout, *beside, r, found, states);
        if (layout.is_valid(r)) return;
        value[r] = 0;
        std::fill_n(row_stats, static_cast<int>(kStats), R{0});
        row_stats[kRowClass] = static_cast<R>(static_cast<int>(RowClass::zero));
    }
    template <class SumsOf>
    void finish_formula(std::int64_t r, SumsOf sums_of) const {
        R* const row_stats = stats + r * kStats;
        const FormulaRowNumbers of_row =
            row_numbers(layout.p, static_cast<double>(row_stats[kDivergence]), total(layout, sums_of));
        // The comparison leaves a NaN as it is.
        value[r] = row_stats[kValue] = static_cast<R>(of_row.value < 0 ? 0 : of_row.value);
        row_stats[kMeanA] = static_cast<R>(of_row.mean_a);
        row_stats[kMeanB] = static_cast<R>(of_row.mean_b);
        row_stats[kRowBeta] = static_cast<R>(of_row.beta);
    }
    // Both sweeps of a row, the second from cache.
    void of_row(std::int64_t r) const {
        finish_kl(r, [&](std::int64_t n) { return kl_block(r, n); });
        if (layout.p.formula == Formula::kl) return;
        finish_formula(r, [&](std::int64_t n) { return formula_block(r, n); });
    }
    void of_all() const {
        const bool fp32 = layout.rows() > 0 && layout.row(0).fits_fp32();
        if (!layout.splits_rows() || !fp32) return for_each_row(layout, [&](std::int64_t r) { of_row(r); });
        fold_blocks(
            layout, true, [&](std::int64_t r, std::int64_t n) { return kl_block(r, n); },
            [&](std::int64_t r, auto state_of) { finish_kl(r, state_of); });
        if (layout.p.formula == Formula::kl) return;
        fold_blocks(
            layout, true, [&](std::int64_t r, std::int64_t n) { return formula_block(r, n); },
            [&](std::int64_t r, auto sums_of) { finish_formula(r, sums_of); });
    }
};

template <class R>
struct GradientOf {
    const Layout& layout;
    const R *stats, *row_scale;
    const Gradient &to_a, &to_b;
    const Beside* beside;
    bool non_temporal;

    GradientOf(const Layout& in, const R* stats_, const R* row_scale_, const Gradient& a, const Gradient& b,
               const Beside* beside_)
        : layout(in),
          stats(stats_),
          row_scale(row_scale_),
          to_a(a),
          to_b(b),
          beside(beside_ != nullptr && beside_->label_row_scale != nullptr ? beside_ : nullptr) {
        const RowPair& p = in.p;
        const bool for_a = uses_non_temporal_stores(a, p.a, p.size_a, p.size_b, p.columns);
        const bool for_b = uses_non_temporal_stores(b, p.b, p.size_a, p.size_b, p.columns);
        non_temporal = for_a || for_b;
    }
    LabelTerm label(std::int64_t r) const {
        return beside == nullptr ? LabelTerm{} : label_term(layout, *beside, r);
    }
    // The label's term comes from logits that the gradient may be written over.
    void of_row(std::int64_t r, std::int64_t first, std::int64_t last, const LabelTerm& of_label) const {
        RowScalars scalars{};
        scalars.row_class = RowClass::zero;
        if (layout.is_valid(r)) scalars = read(layout.p, r, stats + r * kStats, row_scale[r]);
        layout.k.gradient(layout.row(r), scalars, layout.row_of(to_a, r), layout.row_of(to_b, r), first, last,
                          non_temporal, of_label);
    }
    void of_block(std::int64_t r, std::int64_t n, const LabelTerm& of_label) const {
        of_row(r, layout.first(n), layout.last(n), of_label);
    }
    void of_all() const {
        if (!layout.splits_rows())
            return for_each_row(layout, [&](std::int64_t r) { of_row(r, 0, layout.p.columns, label(r)); });
        std::vector<LabelTerm> labels;
        for (std::int64_t r = 0; r < layout.rows(); ++r) labels.push_back(label(r));
        for_each_block(layout, [&](std::int64_t r, std::int64_t n) {
            of_block(r, n, labels[static_cast<std::size_t>(r)]);
        });
    }
};

}  // namespace

RowResult evaluate(const Layout& layout, const Row& row) {
    return evaluate(layout, row, [&](std::int64_t n) { return layout.block(row, n); });
}

void value(const RowPair& p, bool wide, void* value, void* stats, const Beside* beside) {
    const Layout layout{p, kernels()};
    in_compute_type(wide, [&]<class R>() {
        // The formulas' second sweep reads what the first one wrote to the stats.
        const std::size_t own_size = stats ? 0 : static_cast<std::size_t>(layout.rows() * kStats);
        const std::unique_ptr<R[]> own(new R[own_size]);
        Value<R>{layout, static_cast<R*>(value), stats ? static_cast<R*>(stats) : own.get(), beside}.of_all();
    });
}

void gradient(const RowPair& p, bool wide, const void* stats, const void* row_scale, const Gradient& to_a,
              const Gradient& to_b, const Beside* beside) {
    const Layout layout{p, kernels()};
    in_compute_type(wide, [&]<class R>() {
        GradientOf<R>(layout, static_cast<const R*>(stats), static_cast<const R*>(row_scale), to_a, to_b,
                      beside)
            .of_all();
    });
}

void value_and_gradient(const RowPair& p, bool wide, const void* row_scale, void* value, void* stats,
                        const Gradient& to_a, const Gradient& to_b, const Beside* beside) {
    const Layout layout{p, kernels()};
    in_compute_type(wide, [&]<class R>() {
        R* const row_stats = static_cast<R*>(stats);
        const Value<R> values{layout, static_cast<R*>(value), row_stats, beside};
        if (layout.splits_rows()) values.of_all();
        const GradientOf<R> gradients(layout, row_stats, static_cast<const R*>(row_scale), to_a, to_b,
                                      beside);
        if (layout.splits_rows()) return gradients.of_all();
        for_each_row(layout, [&](std::int64_t r) {
            values.of_row(r);
            // From the last block to the first: the end of the row was read last and is in cache, while in
            // reading order a row a little larger than the cache would be gone before it is read again.
            const LabelTerm label = gradients.label(r);
            for (std::int64_t n = layout.blocks() - 1; n >= 0; --n) gradients.of_block(r, n, label);
        });
    });
}

void formula_sums(const RowPair& p, bool wide, const void* stats, double* out) {
    if (p.formula == Formula::kl) throw std::invalid_argument("formula_sums: KL(a||b) has no formula pass");
    const Layout layout{p, kernels()};
    in_compute_type(wide, [&]<class R>() {
        const auto block = [&](std::int64_t r, std::int64_t n) {
            if (!layout.is_valid(r)) return FormulaSums{};
            return layout.formula_block(layout.row(r),
                                        read(p, r, static_cast<const R*>(stats) + r * kStats, R{1}), n);
        };
        fold_blocks(layout, layout.splits_rows(), block, [&](std::int64_t r, auto sums_of) {
            const FormulaSums sums = total(layout, sums_of);
            out[3 * r] = sums.value;
            out[3 * r + 1] = sums.mean_a;
            out[3 * r + 2] = sums.mean_b;
        });
    });
}

Formula formula_named(const char* name) {
    const std::string_view wanted(name);
    std::string known = "kl";
    if (wanted == known) return Formula::kl;
    if (wanted == "comparison") return Formula::comparison;  // of formula_sums() alone
#define X(formula)                                   \
    if (wanted == #formula) return Formula::formula; \
    known += ", " #formula;
    KL_FORMULAS(X)
#undef X
    throw std::invalid_argument("formula " + std::string(wanted) + ": the native kernels have " + known);
}

}  // namespace kl
