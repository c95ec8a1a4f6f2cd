#include "pair/beside.h"

#include <cmath>
#include <limits>

namespace kl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

ComplementRow side_of(const Layout& layout, const Beside& of, std::int64_t r, double inverse_temperature) {
    const Logits& x = of.of_a ? layout.p.a : layout.p.b;
    return {layout.row_of(x, r), x.dtype, inverse_temperature, layout.p.columns, nullptr, 0, nullptr};
}

double own_scale(const Layout& layout, const Beside& of, std::int64_t r) {
    return of.of_a ? layout.p.a_scale(r) : layout.p.b_scale(r);
}

// Where the state of a block says the side's log-sum-exp, as a sum of one column; empty where it does not.
ComplementSums known_sum(const State& state, bool of_a) {
    ComplementSums out;
    const RowResult found = finish(state);
    const double lse = of_a ? found.lse_a : found.lse_a + found.shift;
    if (!found.trusted || !std::isfinite(lse)) return out;
    out.m = lse;
    out.z = 1;
    return out;
}

// -log q of a column, from its logit and the log-sum-exp of the others.
double surprise(double logit, double rest) {
    const double above = rest - logit;
    return above > 0 ? above + std::log1p(std::exp(-above)) : std::log1p(std::exp(above));
}

bool is_column(const Layout& layout, std::int64_t label) { return label >= 0 && label < layout.p.columns; }

double label_logit(const Layout& layout, const ComplementRow& row, std::int64_t label) {
    return layout.k.logit(row.x, row.dtype, label) * row.inverse_temperature;
}

// A span's sum measured from where the row's others lie; empty where that is too far below its top for fp32.
ComplementSums sum_near(const ComplementKernels& kernels, const ComplementRow& row, double m,
                        std::int64_t first, std::int64_t last) {
    if (!(std::fabs(m) < 0x1p13)) return {};
    const ComplementSums out = kernels.sum_known(row, static_cast<float>(m), first, last);
    return out.z < 0x1p15 && out.t < 2 * out.z ? out : ComplementSums{};
}

// log sum e^x of the columns other than the label.
double rest_of_row(const Layout& layout, const Beside& of, std::int64_t r, const std::vector<State>& states) {
    const ComplementKernels& kernels = *layout.k.complement;
    const std::int64_t label = of.labels[r];
    ComplementRow row = side_of(layout, of, r, of.label_scale(r));
    std::int64_t scratch = 0;
    row.ids = &label;
    row.n_ids = 1;
    row.scratch = &scratch;
    ComplementSums total;
    // From the last block to the first: the end of the row is in cache.
    for (std::int64_t n = layout.blocks() - 1; fits_fp32(row) && n >= 0; --n) {
        ComplementSums block;
        const bool holds_label = label >= layout.first(n) && label < layout.last(n);
        if (!holds_label && !states.empty()) block = known_sum(states[static_cast<std::size_t>(n)], of.of_a);
        if (block.z == 0 && !holds_label)
            block = sum_near(kernels, row, total.m, layout.first(n), layout.last(n));
        if (block.z == 0) block = kernels.sum(row, layout.first(n), layout.last(n), false);
        total += block;
    }
    return finish(kernels, row, total, false).rest_lse;
}

double surprise_of_row(const Layout& layout, const Beside& of, std::int64_t r,
                       const std::vector<State>& states) {
    const std::int64_t label = of.labels[r];
    if (!is_column(layout, label)) return std::nan("");
    const ComplementRow row = side_of(layout, of, r, of.label_scale(r));
    return surprise(label_logit(layout, row, label), rest_of_row(layout, of, r, states));
}

double entropy_of_row(const Layout& layout, const Beside& of, std::int64_t r, const RowResult& found) {
    const ComplementKernels& kernels = *layout.k.complement;
    const ComplementRow row = side_of(layout, of, r, own_scale(layout, of, r));
    ComplementSums total;
    const double lse = of.of_a ? found.lse_a : found.lse_a + found.shift;
    // Above it fp32's exponents lose the digits that count.
    if (fits_fp32(row) && std::fabs(lse) < 0x1p13) {
        for (std::int64_t n = layout.blocks() - 1; n >= 0; --n) {
            const ComplementSums block =
                kernels.sum_known(row, static_cast<float>(lse), layout.first(n), layout.last(n));
            total.m = block.m;
            total.z += block.z;
            total.t += block.t;
        }
        return finish(kernels, row, total, true).entropy;
    }
    for (std::int64_t n = layout.blocks() - 1; fits_fp32(row) && n >= 0; --n)
        total += kernels.sum(row, layout.first(n), layout.last(n), true);
    return finish(kernels, row, total, true).entropy;
}

}  // namespace

bool needs_states(const Layout& layout, const Beside& of, std::int64_t r) {
    return of.labels != nullptr && layout.is_valid(r) && of.label_scale(r) == own_scale(layout, of, r);
}

void write_beside(const Layout& layout, const Beside& of, std::int64_t r, const RowResult& found,
                  const std::vector<State>& states) {
    const bool valid = layout.is_valid(r);
    if (of.surprises != nullptr) of.surprises[r] = valid ? surprise_of_row(layout, of, r, states) : 0;
    if (of.entropies != nullptr) of.entropies[r] = valid ? entropy_of_row(layout, of, r, found) : 0;
}

LabelTerm label_term(const Layout& layout, const Beside& of, std::int64_t r) {
    LabelTerm out;
    out.of_a = of.of_a;
    const double factor = of.label_row_scale[r] * of.label_scale(r);
    if (!layout.is_valid(r) || factor == 0) return out;
    const ComplementRow row = side_of(layout, of, r, of.label_scale(r));
    out.column = of.labels[r];
    out.scale = row.exact_scale();
    out.factor = factor;
    if (!is_column(layout, out.column)) {
        out.lse = std::nan("");
        return out;
    }
    const double logit = label_logit(layout, row, out.column);
    // Of a label without mass -log q is infinite: it says nothing of the others.
    const double lse = logit == -kInfinity ? rest_of_row(layout, of, r, {}) : logit + of.surprises[r];
    out.lse = lse / kLn2;
    out.at_label = factor * std::expm1(-of.surprises[r]);
    return out;
}

}  // namespace kl
