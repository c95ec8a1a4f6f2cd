// The value's sweep: one read of a stretch of columns in fp32, whatever 16- or 32-bit format holds them.
//
// It goes tile by tile, small enough that a tile read twice comes from L1 the second time, with the
// frame (m, c) fixed inside a tile. The frame that suits the first tile need not suit the row: real
// teachers put most of their mass on a few tokens in some other tile, and seen from a c that is far
// from E_a[d] almost all of a2 would cancel in the end. So where a tile moves the mean far, the tile
// is swept again from its own mean. That happens about ln(#tiles) times in a row.
#pragma once

#include <algorithm>
#include <cmath>

#include "elementary.h"
#include "formats.h"
#include "stages.h"
#include "state.h"

namespace kl::KL_ISA {

// 64 additions to each fp32 accumulator, so that rounding stays well under the promise even where
// every column adds the same number; with AVX-512 2048 columns, 16 KiB of fp32 from both sides.
constexpr std::int64_t kTile = 128 * lanes<VF>;
// A block begins with little: enough to know a frame by, cheap to sweep twice.
constexpr std::int64_t kFirstTile = kTile / 8;
constexpr std::int64_t kBlock = 32768;  // the unit of work where a row is split over threads
constexpr std::int64_t kAhead = 4096;   // bytes: the hardware prefetchers stop at page ends

// How far x went shows in the largest g2(x), which is large on both sides: past this one 2^x may outweigh
// a weight that has already underflowed to nothing, and so may -x, where b is -1e30.
constexpr double kLargeG = 0x1p48;
// g2(16) and g2(32), where the rounding of 2^x begins to show in lse(b) and in the value.
constexpr double kTailG = 0x1p16 * kLog2e, kFarTailG = 0x1p32 * kLog2e;
// The same for the careful sweep, on x.
constexpr float kTailX = 16, kLargeX = 48, kFarB = -0x1p32f;
constexpr float kHugeA = 0x1p20f;
constexpr double kLargeSum = 0x1p100;

constexpr float kVast = 0x1p100f;  // beyond it products with log2(e) / temperature may overflow

// A stretch of one row. Columns that do not fill a step lie in a copy of one step, filled up in a way
// that each reader can digest.
template <class T>
struct Stretch {
    const T *a, *b;
    std::int64_t columns;  // a multiple of kStep<T>
    std::int64_t rest;     // columns in the copy
    T last_a[kStep<T>], last_b[kStep<T>];

    Stretch(const T* a_, const T* b_, std::int64_t n)
        : a(a_), b(b_), columns(n / kStep<T> * kStep<T>), rest(n - columns) {
        if (rest == 0) return;
        std::memcpy(last_a, a + columns, static_cast<std::size_t>(rest) * sizeof(T));
        std::memcpy(last_b, b + columns, static_cast<std::size_t>(rest) * sizeof(T));
        fill(minus_infinity<T>(), minus_infinity<T>());
    }

    std::int64_t padding() const { return rest == 0 ? 0 : kStep<T> - rest; }
    void fill(T with_a, T with_b) {
        for (std::int64_t i = rest; i < kStep<T>; ++i) {
            last_a[i] = with_a;
            last_b[i] = with_b;
        }
    }

    // Calls f(a, b) for every step, the copy last.
    template <class F>
    KL_INLINE void for_each_step(F f) const {
        for (std::int64_t i = 0; i < columns; i += kStep<T>) f(a + i, b + i);
        if (rest > 0) f(last_a, last_b);
    }

    // The same, with end_run() after every kRun steps and at the end. As in in_two_stages, it stands outside
    // the inner loop.
    template <class F, class EndRun>
    KL_INLINE void for_each_step(F f, EndRun end_run) const {
        for (std::int64_t i = 0; i < columns;) {
            const std::int64_t stop = std::min(columns, i + kRun * kStep<T>);
            for (; i < stop; i += kStep<T>) f(a + i, b + i);
            end_run();
        }
        if (rest == 0) return;
        f(last_a, last_b);
        end_run();
    }
};

// The lines of one step, far enough ahead to come in time.
template <class T>
KL_INLINE void prefetch_step(const T* at) {
    for (std::int64_t line = 0; line < static_cast<std::int64_t>(kStep<T> * sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead + line);
}

struct Sums {
    double z, a1, a2, largest_g;
};

struct Accumulators {
    VF z{}, a1{}, a2{}, largest_g{};

    KL_INLINE void take(Accumulators& run) {
        z += run.z;
        a1 += run.a1;
        a2 += run.a2;
        run.z = run.a1 = run.a2 = VF{};
    }
};

// What a column comes to before the polynomials: log2 of its weight, its distance x from the frame's c, and
// the two reduced. Exact also keeps what fl(b - a) rounds away.
struct Seen {
    VF log_w, x;
    Reduced<VF> w, two_x;
};

template <bool Exact>
KL_INLINE Seen see(VF a, VF b, VF k, VF m, VF c) {
    const VF d = b - a;
    VF x = fma(d, k, -c);
    if constexpr (Exact) x = fma(difference_error(b, a, d), k, x);
    x = g2_domain(x);
    const VF log_w = fma(a, k, -m);
    return {log_w, x, reduce(clamp_exponent(log_w)), reduce(clamp_exponent(x))};
}

// Two vectors at a time into one set of sums: two sets would not fit the registers, and the sums' roundings
// are as many either way.
KL_INLINE void accumulate(const Pair<Seen>& step, Accumulators& to) {
    const Seen &s = step.x, &t = step.y;
    const VF w_s = exp2_from(s.log_w, s.w), w_t = exp2_from(t.log_w, t.w);
    const VF g_s = g2_from(s.x, s.two_x), g_t = g2_from(t.x, t.two_x);
    to.z += w_s + w_t;
    to.a1 += mad(w_s, s.x, w_t * t.x);
    to.a2 += mad(w_s, g_s, w_t * g_t);
    to.largest_g = max(g_s, max(g_t, to.largest_g));
}

// The fast sweep. A NaN or an infinity anywhere makes a sum that is not finite.
template <bool Exact, class T>
inline Sums sweep(const Stretch<T>& in, float scale, Frame frame) {
    const VF k = splat<VF>(scale), m = splat<VF>(frame.m), c = splat<VF>(frame.c);
    Accumulators s, total;
    const auto see_step = [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        return Pair<Seen>{see<Exact>(a.x, b.x, k, m, c), see<Exact>(a.y, b.y, k, m, c)};
    };
    in_two_stages(
        in.columns, kStep<T>,
        [&](std::int64_t i) KL_INLINE_LAMBDA {
            prefetch_step(in.a + i);
            prefetch_step(in.b + i);
            return see_step(in.a + i, in.b + i);
        },
        [&](std::int64_t, const Pair<Seen>& step) KL_INLINE_LAMBDA { accumulate(step, s); }, kRun,
        [&]() KL_INLINE_LAMBDA { total.take(s); });
    if (in.rest > 0) accumulate(see_step(in.last_a, in.last_b), s);
    total.take(s);
    return {sum(total.z), sum(total.a1), sum(total.a2), static_cast<double>(largest(s.largest_g))};
}

// At least log2 x and less than 0.09 more, for a normal x > 0: between two powers of 2 a logarithm lies above
// its chord.
inline double log2_above(double x) {
    const auto exponent_and_fraction = static_cast<double>(bits<std::int64_t>(x)) * 0x1p-52;
    return exponent_and_fraction - (1023 - 0.0861);
}

inline bool is_usable(const Sums& s) {
    return s.z < kLargeSum && s.a2 < kLargeSum && std::fabs(s.a1) < kLargeSum && s.largest_g < kLargeG;
}

// The sweep for stretches that hold -inf, or an x too large for w * g(x). There w g(x) is taken as
// 2^(b - c - m) - w (1 + x), and columns missing on one side or on both get what the limit gives.
template <class T>
inline State sweep_holes(const Stretch<T>& in, float scale, Frame frame) {
    const VF inf = splat<VF>(__builtin_inff()), zero{}, vast = splat<VF>(kVast), far = splat<VF>(kTailX);
    const VF log2e = splat<VF>(static_cast<float>(kLog2e));
    const VF k = splat<VF>(scale), m = splat<VF>(frame.m), c = splat<VF>(frame.c);
    const float mc = frame.m + frame.c;
    const VF mc_hi = splat<VF>(mc), mc_lo = splat<VF>(-difference_error(-frame.m, frame.c, -mc));
    // fma(-3e38, k, -m) is -inf, whose range reduction is NaN: masks of that size are common.
    const VF deepest = splat<VF>(-1000);

    VF z{}, a1{}, a2{}, size{}, high = splat<VF>(-1), low{};
    VF run_z{}, run_a1{}, run_a2{};
    const auto end_run = [&]() KL_INLINE_LAMBDA {
        z += run_z;
        a1 += run_a1;
        a2 += run_a2;
        run_z = run_a1 = run_a2 = zero;
    };
    VI bad{}, infinite{}, seen_b{}, large{}, holes{};
    const auto column = [&](VF a, VF b) KL_INLINE_LAMBDA {
        const VI no_a = a == -inf, no_b = b == -inf;
        bad |= ~((a < inf) & (b < inf));
        infinite |= ~no_a & no_b;
        seen_b |= ~no_b;
        holes -= no_a | no_b;
        a = no_a ? zero : a;
        b = no_b ? zero : b;
        large |= (abs(a) > vast) | (abs(b) > vast);
        const VF d = b - a;
        const VF x_ = min(fma(difference_error(b, a, d), k, fma(d, k, -c)), vast);
        const VF x = (no_a | no_b) ? zero : x_;
        const VF w_ = exp2(max(fma(a, k, -m), deepest)), w_b_ = exp2(max(fma(b, k, -mc_hi) - mc_lo, deepest));
        const VF w = no_a ? zero : w_, w_b = no_b ? zero : w_b_;
        VF wg = x > far ? (w_b - w) * log2e - w * x : w * g2(min(x, far));
        wg = no_a ? w_b * log2e : wg;
        wg = (no_b & ~no_a) ? -w * log2e : wg;
        run_z += w;
        run_a1 = mad(w, x, run_a1);
        run_a2 += wg;
        size += abs(wg);
        high = max(x, high);
        low = min(x, low);
    };
    in.for_each_step(
        [&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
            const auto a = load_pair(at_a), b = load_pair(at_b);
            column(a.x, b.x);
            column(a.y, b.y);
        },
        end_run);

    State out;
    out.frame = frame;
    out.z = sum(z);
    out.a1 = sum(a1);
    out.a2 = sum(a2);
    out.spent_z = out.z;
    out.spent = sum(size);
    out.top_d = static_cast<double>(frame.c + largest(high));
    std::int64_t missing = -in.padding();
    for (int i = 0; i < lanes<VF>; ++i) missing += holes[i];
    if (missing > 0) out.flags |= kSawHole;
    if (any<VF>(large)) out.flags |= kSawVast;
    if (any<VF>(bad)) out.flags |= kSawNan;
    if (any<VF>(infinite)) out.flags |= kSawInfinite;
    if (any<VF>(seen_b)) out.flags |= kSawB;
    if (largest(high) > kTailX) out.flags |= kSawTail;
    if (largest(high) > kLargeX) out.flags |= kSawLargeX;
    if (largest(-low) > -kFarB) out.flags |= kSawFarB;
    // Some instruction sets' exp2 stops at 2^126 where it should overflow.
    if (!(out.z < kLargeSum && std::fabs(out.a2) < kLargeSum)) out.a2 = __builtin_inf();
    return out;
}

// A frame for a stretch that may hold anything: the largest finite a. Where a has nothing at all,
// the frame serves b's columns alone.
template <class T>
inline Frame frame_for(const Stretch<T>& in, float scale, float c) {
    VF top_a = splat<VF>(-__builtin_inff()), top_b = top_a;
    in.for_each_step([&](const T* at_a, const T* at_b) KL_INLINE_LAMBDA {
        const auto a = load_pair(at_a), b = load_pair(at_b);
        top_a = max(a.x, max(a.y, top_a));
        top_b = max(b.x, max(b.y, top_b));
    });
    const float a = largest(top_a) * scale, b = largest(top_b) * scale;
    if (std::fabs(a) < __builtin_inff()) return {a, c};
    if (std::fabs(b) < __builtin_inff()) return {b, 0};
    return {0, c};
}

// b - a at the first column that carries weight: near enough to E_a[d] to begin with.
template <class T>
inline float first_shift(const Stretch<T>& in, float scale, float m) {
    const auto search = [&](const T* at_a, const T* at_b, std::int64_t n, float& d) {
        for (std::int64_t i = 0; i < n; ++i) {
            const float a = widen_one(at_a[i]);
            d = (widen_one(at_b[i]) - a) * scale;
            if (a * scale > m - 20 && std::fabs(d) < kVast) return true;
        }
        return false;
    };
    float d = 0;
    return search(in.a, in.b, in.columns, d) || search(in.last_a, in.last_b, in.rest, d) ? d : 0;
}

// A frame this far (in ln 2) below the mean is too coarse to measure from: 2^54 comes of an exponent that
// was rounded by 2e-6, and it hides the move itself, since a2 is as large.
constexpr double kFarMove = 4;

// The part of a2 that the mean's distance from c makes up, twice: errors of what cancels stay below
// kWorstError times what is left.
constexpr double kFarFromMean = 0.8;

// The same where a2 grows with 2^x and hides it: 0.7 nats, that is 1 in units of ln 2. Further off, errors
// of a1 count in the divergence.
constexpr double kNearMean = 1.0;

// A tile that weighs more has its top well above the frame's m, or very many columns above it. The top's
// exponent is rounded by up to a 2^24th of itself, and the normaliser passes that on to every column's
// gradient: the tile is weighed again from a reference near its top.
constexpr double kHeavy = 0x1p16;

// Collects the state of a block of columns.
class Collector {
public:
    explicit Collector(float scale) : scale_(scale) {}

    template <class T>
    void take(Stretch<T> in) {
        if (total_.is_empty()) {
            frame_ = frame_for(in, scale_, 0);
            frame_.c = first_shift(in, scale_, frame_.m);
        }
        State piece = look(in, frame_);
        if (piece.z > kHeavy)
            piece = look(in, {frame_.m + static_cast<float>(std::ilogb(piece.z)), frame_.c});
        State both = add(piece);
        if (moves_the_mean_far(both)) {
            const Frame to = at_mean(both);
            State moved = seen_from(to, both);
            const auto error = [&] { return total_.is_empty() ? moved.spent : seen_from(to, piece).spent; };
            if (piece.has_mass() && (is_far_from_mean(both) || !(error() <= kWorstError * moved.a2))) {
                piece = look(in, at_mean(piece));
                both = add(piece);
                moved = seen_from(at_mean(both), both);
            }
            both = moved;
        }
        total_ = both;
        frame_ = both.frame;
    }

    const State& total() const { return total_; }

private:
    static Frame at_mean(const State& s) {
        return {s.frame.m, static_cast<float>(static_cast<double>(s.frame.c) + s.a1 / s.z)};
    }

    template <class T>
    State look(Stretch<T>& in, Frame frame) {
        // A frame so far out that bf16 could not place the filling well below m.
        const bool far_out = std::fabs(frame.m) > 8192 || std::fabs(frame.c) > 8192;
        if (!expect_holes_ && !(in.rest > 0 && far_out)) {
            if (in.rest > 0) {
                // Filled up with columns of no weight and a d near c. Where the format cannot hold them,
                // -inf comes of it and the sums say so.
                T a, b;
                round_one((frame.m - 1000) / scale_, a);
                round_one((frame.m - 1000 + frame.c) / scale_, b);
                in.fill(a, b);
            }
            // The error of fl(b - a) is at most 2^-24 |c|: nothing beside an x that is usually over |c| / 16.
            const bool coarse = 512 * total_.a2 > kLn2 * total_.z * static_cast<double>(frame.c * frame.c);
            const Sums s = coarse ? sweep<false>(in, scale_, frame) : sweep<true>(in, scale_, frame);
            if (is_usable(s)) {
                // 2^x = 1 + (x + g) ln 2, and no x is past 48.
                const double top_x = log2_above(kLn2 * s.largest_g + 35);
                State out{frame, s.z, s.a1, s.a2, static_cast<double>(frame.c) + top_x, s.z, s.a2, kSawB};
                if (coarse) out.flags |= kSawRounding;
                if (frame.m > kHugeA) out.flags |= kSawHugeA;
                if (s.largest_g > kTailG) out.flags |= kSawTail;
                if (s.largest_g > kFarTailG) out.flags |= kSawFarTail;
                return out;
            }
        }
        if (in.rest > 0) in.fill(minus_infinity<T>(), minus_infinity<T>());
        State out = sweep_holes(in, scale_, frame_for(in, scale_, frame.c));
        if (out.frame.m > kHugeA) out.flags |= kSawHugeA;
        expect_holes_ = (out.flags & (kSawHole | kSawVast | kSawLargeX)) != 0;
        return out;
    }

    State add(const State& piece) const {
        if (piece.frame != total_.frame) return merge(total_, piece);
        State out = total_;
        out.z += piece.z;
        out.a1 += piece.a1;
        out.a2 += piece.a2;
        out.spent_z += piece.spent_z;
        out.spent += piece.spent;
        out.top_d = std::max(out.top_d, piece.top_d);
        out.flags |= piece.flags;
        return out;
    }

    // True where, seen from here, more than two fifths of a2 would cancel in the end.
    static bool moves_the_mean_far(const State& s) {
        return s.has_mass() && std::isfinite(s.a2) &&
               (std::fabs(s.a1) > kNearMean * s.z || s.a1 * s.a1 * kLn2 > kFarFromMean * s.a2 * s.z);
    }

    static bool is_far_from_mean(const State& s) { return std::fabs(s.a1) > kFarMove * s.z; }

    float scale_;
    Frame frame_;
    State total_;
    bool expect_holes_ = false;
};

// Feeds `n` columns to `take`, tile by tile. A short row begins with a small tile, too: three in ten first
// tiles are swept twice.
template <class T, class Take>
inline void for_each_tile(const T* a, const T* b, std::int64_t n, Take take) {
    std::int64_t length = n > 4 * kFirstTile ? kFirstTile : n;
    for (std::int64_t i = 0; i < n; i += length, length = n - i < kTile ? n - i : kTile)
        take(Stretch<T>(a + i, b + i, length));
}

}  // namespace kl::KL_ISA
