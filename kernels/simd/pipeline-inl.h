// Software pipelining: a loop whose steps overlap.
#pragma once

#include <cstdint>

#include "simd/vectors-inl.h"

namespace kl::KL_ISA {

// Steps after which the sums of a run are added to those of the tile: beside a column that holds most of the
// mass each addition of fp32 may lose 2^-25 of it, and rows of 16-bit logits, in which many columns are
// equal, lose it always in one direction. Of a tile's 64 additions in a row that was 2e-6 of the normaliser;
// runs of 16 leave 20 in a row, runs of 8 would leave 16 and cost 3 % of the loop.
constexpr std::int64_t kRun = 16;
// An entropy weighs what a run's sums lose with exponents of up to 20.
constexpr std::int64_t kEntropyRun = 8;

// end(i, begin(i)) for i = 0, step, 2 step, ... below n, a multiple of step; each step begins before the one
// ahead of it ends. A step of these kernels is one chain of some 20 dependent instructions. In program order
// a processor's schedulers (Zen 5: 38 instructions a pair of pipes) fill up with the chain's waiting end
// before they see the next step; with two chains side by side in the code they have work.
//
// After every `run` of steps but the last end_run() is called, from outside the loop that the registers
// belong to: asked in each step, it would keep its sums in registers that the step needs.
template <class Begin, class End, class EndRun>
KL_INLINE void pipelined(std::int64_t n, std::int64_t step, Begin begin, End end, std::int64_t run,
                         EndRun end_run) {
    if (n <= 0) return;
    auto now = begin(std::int64_t{0});
    std::int64_t i = step;
    while (true) {
        const std::int64_t stop = smaller(n, i + run * step);
        for (; i < stop; i += step) {
            const auto next = begin(i);
            end(i - step, now);
            now = next;
        }
        if (i >= n) break;
        end_run();
    }
    end(n - step, now);
}

template <class Begin, class End>
KL_INLINE void pipelined(std::int64_t n, std::int64_t step, Begin begin, End end) {
    pipelined(n, step, begin, end, n / step, []() KL_INLINE_LAMBDA {});
}

}  // namespace kl::KL_ISA
