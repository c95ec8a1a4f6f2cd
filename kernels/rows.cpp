// Compiled once per instruction set: everything a row needs, behind one table of functions.
#include <cmath>

#include "careful.h"
#include "family_sweeps.h"
#include "gradient.h"
#include "pair_sweep.h"
#include "row.h"
#include "side.h"
#include "sweep.h"

namespace kl::KL_ISA {
namespace {

template <class T>
const T* at(const void* row, std::int64_t column) {
    return static_cast<const T*>(row) + column;
}

template <class T>
State collect_as(const Row& row, std::int64_t first, std::int64_t last) {
    Collector collector(row.scale());
    for_each_tile(at<T>(row.a, first), at<T>(row.b, first), last - first,
                  [&](const Stretch<T>& tile) { collector.take(tile); });
    return collector.total();
}

// Two formats: widened to fp32 in L1 first.
State collect_mixed(const Row& row, std::int64_t first, std::int64_t last) {
    Collector collector(row.scale());
    float a[kTile], b[kTile];
    for (std::int64_t i = first; i < last; i += kTile) {
        const std::int64_t n = last - i < kTile ? last - i : kTile;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        for_each_tile(a, b, n, [&](const Stretch<float>& tile) { collector.take(tile); });
    }
    return collector.total();
}

RowResult careful_row(const Row& row) { return careful(row); }

State collect(const Row& row, std::int64_t first, std::int64_t last) {
    if (row.dtype_a != row.dtype_b) return collect_mixed(row, first, last);
    return in_fp32_format(row.dtype_a, [&]<class T>() { return collect_as<T>(row, first, last); });
}

template <class T>
PairState collect_pair_as(const Row& row, std::int64_t first, std::int64_t last) {
    PairCollector collector(row.scale());
    const T* a = at<T>(row.a, first);
    for_each_tile(a, at<T>(row.b, first), last - first,
                  [&](const Stretch<T>& tile) { collector.take(tile, first + (tile.a - a)); });
    return collector.total();
}

PairState collect_pair_mixed(const Row& row, std::int64_t first, std::int64_t last) {
    PairCollector collector(row.scale());
    float a[kTile], b[kTile];
    for (std::int64_t i = first; i < last; i += kTile) {
        const std::int64_t n = last - i < kTile ? last - i : kTile;
        widen_run(row.a, row.dtype_a, i, n, a);
        widen_run(row.b, row.dtype_b, i, n, b);
        for_each_tile(a, b, n, [&](const Stretch<float>& tile) { collector.take(tile, i + (tile.a - a)); });
    }
    return collector.total();
}

PairState collect_pair(const Row& row, std::int64_t first, std::int64_t last) {
    if (row.dtype_a != row.dtype_b) return collect_pair_mixed(row, first, last);
    return in_fp32_format(row.dtype_a, [&]<class T>() { return collect_pair_as<T>(row, first, last); });
}

double logit(const void* logits, Dtype dtype, std::int64_t column) {
    double x;
    widen_run(logits, dtype, column, 1, &x);
    return x;
}

std::int64_t find(const void* logits, Dtype dtype, std::int64_t first, std::int64_t columns, float logit) {
    float x[kScratchColumns];
    for (std::int64_t i = 0; i < columns; i += kScratchColumns) {
        const std::int64_t n = columns - i < kScratchColumns ? columns - i : kScratchColumns;
        widen_run(logits, dtype, first + i, n, x);
        for (std::int64_t j = 0; j < n; ++j)
            if (x[j] == logit) return first + i + j;
    }
    return -1;
}

// Whether the scalars say too little of the row for its gradient: past 2^20 two fp32 do not hold an
// lse to the precision that its subtraction needs.
bool are_vast(const RowScalars& s) {
    constexpr double limit = 0x1p20;
    return !(std::fabs(s.lse_a) < limit) || !(std::fabs(s.lse_b) < limit) ||
           (s.divergence > limit && s.divergence < __builtin_inf());
}

// Whether a family's sweeps need fp64 although the formats do not ask for it.
bool need_fp64(const RowScalars& s) {
    if (s.family == Family::kl) return false;
    // top_r is +inf where the value's sweep did not trust its fp32, and past 2^20 r counts where b is.
    // A beta this close to an end has terms of second order that underflow.
    return !(s.top_r < 0x1p20) || (s.family != Family::tv && !(s.beta > 0x1p-20 && s.beta < 1 - 0x1p-20));
}

// The scalars of a vast row as fp64 has them: the stats, in fp32, could not hold them.
RowScalars looked_at_again(const Row& row, RowScalars s) {
    const CarefulResult again = careful(row);
    s.lse_a = again.lse_a;
    s.lse_b = again.lse_b;
    s.shift = again.shift;
    s.divergence = again.divergence;
    return s;
}

FamilySums family_sums(const Row& row, const RowScalars& scalars, std::int64_t first, std::int64_t last) {
    const double nan = std::nan("");
    if (scalars.verdict == Verdict::zero) return {};
    if (scalars.verdict == Verdict::nan) return {nan, nan, nan};
    FamilySums total;
    const auto copies = [&]<class R>(const RowScalars& s) {
        for_each_copy<R>(row, first, last,
                         [&](const R* a, const R* b, std::int64_t, std::int64_t n, double scale) {
                             total += family_sums_run(a, b, n, scale, s);
                         });
        return total;
    };
    if (are_vast(scalars)) return copies.template operator()<double>(looked_at_again(row, scalars));
    if (!row.fits_fp32() || need_fp64(scalars)) return copies.template operator()<double>(scalars);
    if (row.dtype_a != row.dtype_b) return copies.template operator()<float>(scalars);
    return in_fp32_format(row.dtype_a, [&]<class T>() {
        return family_sums_run(at<T>(row.a, first), at<T>(row.b, first), last - first, row.exact_scale(),
                               scalars);
    });
}

template <class T>
void gradient_run(const T* a, const T* b, std::int64_t n, double scale, const RowScalars& scalars, T* to_a,
                  T* to_b, bool stream) {
    if (scalars.family == Family::kl)
        kl_gradient_run(a, b, n, scale, scalars, to_a, to_b, stream);
    else
        family_gradient_run(a, b, n, scale, scalars, to_a, to_b, stream);
}

template <class R>
void gradient_through_copies(const Row& row, const RowScalars& scalars, Destination to_a, Destination to_b,
                             std::int64_t first, std::int64_t last) {
    R out_a[kScratchColumns], out_b[kScratchColumns];
    for_each_copy<R>(row, first, last,
                     [&](const R* a, const R* b, std::int64_t i, std::int64_t n, double scale) {
                         gradient_run(a, b, n, scale, scalars, to_a.data ? out_a : nullptr,
                                      to_b.data ? out_b : nullptr, false);
                         if (to_a.data) round_run(out_a, n, to_a.data, to_a.dtype, i);
                         if (to_b.data) round_run(out_b, n, to_b.data, to_b.dtype, i);
                     });
}

template <class T>
T* from(Destination to, std::int64_t column) {
    return to.data == nullptr ? nullptr : static_cast<T*>(to.data) + column;
}

void gradient(const Row& row, const RowScalars& scalars, Destination to_a, Destination to_b,
              std::int64_t first, std::int64_t last, bool stream) {
    const auto settle = [&](Destination& to, double x) {
        fill(to, first, last, x);
        to.data = nullptr;
    };
    const double nan = std::nan("");
    if (scalars.verdict == Verdict::zero) {
        settle(to_a, 0);
        settle(to_b, 0);
    }
    if (scalars.verdict == Verdict::nan || std::isnan(scalars.coefficient_a)) settle(to_a, nan);
    const bool is_kl = scalars.family == Family::kl;
    if (is_kl ? scalars.verdict == Verdict::infinite : !std::isfinite(scalars.mean_a)) settle(to_a, nan);
    if (!is_kl && !std::isfinite(scalars.mean_b)) settle(to_b, nan);
    if (scalars.verdict == Verdict::nan || std::isnan(scalars.coefficient_b)) settle(to_b, nan);
    // p and q are finite in what is left, and a gradient of -0 helps nobody.
    if (to_a.data != nullptr && scalars.coefficient_a == 0) settle(to_a, 0);
    if (to_b.data != nullptr && scalars.coefficient_b == 0) settle(to_b, 0);
    if (to_a.data == nullptr && to_b.data == nullptr) return;

    if (are_vast(scalars))
        return gradient_through_copies<double>(row, looked_at_again(row, scalars), to_a, to_b, first, last);
    if (!row.fits_fp32() || need_fp64(scalars))
        return gradient_through_copies<double>(row, scalars, to_a, to_b, first, last);
    if (row.dtype_a != row.dtype_b)
        return gradient_through_copies<float>(row, scalars, to_a, to_b, first, last);
    in_fp32_format(row.dtype_a, [&]<class T>() {
        gradient_run<T>(at<T>(row.a, first), at<T>(row.b, first), last - first, row.exact_scale(), scalars,
                        from<T>(to_a, first), from<T>(to_b, first), stream);
    });
    if (stream) stream_fence();
}

// To memory as a T, and back.
template <class T>
VF stored(VF x) {
    T kept[kStep<T>];
    store_pair<false>(kept, Pair<VF>{x, x});
    const auto back = load_pair(kept);
    return back.x == back.y ? back.y : splat<VF>(__builtin_nanf(""));
}

VF elementary_function(int which, VF x) {
    const VF one = splat<VF>(1);
    switch (which) {
        case 0:
            return exp2(x);
        case 1:
            return g2(x);
        case 2:
            return exp2m1(x);
        case 3:
            return exponential(x).whole;
        case 4:
            return exponential(x).less_one;
        case 5:
            return log_one_plus(x, one + x).log;
        case 6:
            return log_one_plus(x, one + x).gap;
        case 8:
            return both_ways(x).power;
        case 9:
            return both_ways(x).g;
        case 10:
            return both_ways(x).h;
        case 11:
            return Multiple<VF>(1.0 / 3).of_exp2(reduce(clamp_for_product(x)));
        case 12:
            return stored<Bf16>(x);
        case 13:
            return stored<F16>(x);
        default:
            return log_one_plus(x - one, x).log;
    }
}

void elementary(int which, const float* x, float* y, std::int64_t n) {
    for (std::int64_t i = 0; i + lanes<VF> <= n; i += lanes<VF>)
        store(y + i, elementary_function(which, load<VF>(x + i)));
}

constexpr std::int64_t kProbeStep = 4 * kWidth, kProbeAhead = 4096;

KL_INLINE void prefetch_step(const char* p) {
    for (std::int64_t line = 0; line < kProbeStep; line += 64) __builtin_prefetch(p + kProbeAhead + line);
}

std::uint64_t probe_read(const char* a, const char* b, std::int64_t bytes) {
    VU sums[4] = {};
    for (std::int64_t i = 0; i + kProbeStep <= bytes; i += kProbeStep) {
        prefetch_step(a + i);
        prefetch_step(b + i);
        for (int j = 0; j < 4; ++j) sums[j] ^= load<VU>(a + i + j * kWidth) ^ load<VU>(b + i + j * kWidth);
    }
    std::uint64_t total = 0;
    for (const VU& s : sums)
        for (int i = 0; i < lanes<VF>; ++i) total ^= s[i];
    return total;
}

void probe_write(const char* a, const char* b, char* to, std::int64_t bytes) {
    for (std::int64_t i = 0; i + kProbeStep <= bytes; i += kProbeStep) {
        prefetch_step(a + i);
        prefetch_step(b + i);
        for (int j = 0; j < 4; ++j)
            stream(to + i + j * kWidth, load<VU>(a + i + j * kWidth) ^ load<VU>(b + i + j * kWidth));
    }
    stream_fence();
}

}  // namespace

#define KL_STRING_(x) #x
#define KL_STRING(x) KL_STRING_(x)

extern const RemainderKernels remainder_kernels;
extern const Kernels kernels;
const Kernels kernels{
    KL_STRING(KL_ISA), kBlock, collect, careful_row, family_sums, gradient,    collect_pair,
    side_result,       logit,  find,    elementary,  probe_read,  probe_write, &remainder_kernels};

}  // namespace kl::KL_ISA
