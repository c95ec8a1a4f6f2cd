#include "testing/bandwidth.h"

#include <algorithm>
#include <atomic>

#include "runtime/dispatch.h"
#include "runtime/parallel_for.h"

namespace kl {
namespace {

template <class F>
void for_each_slice(std::int64_t bytes, int threads, F f) {
    constexpr std::int64_t kSlice = 1 << 20;
    parallel_for((bytes + kSlice - 1) / kSlice, threads,
                 [&](std::int64_t i) { f(i * kSlice, std::min(bytes, (i + 1) * kSlice)); });
}

}  // namespace

std::uint64_t probe_read(const void* a, const void* b, std::int64_t bytes, int threads) {
    const Kernels& k = kernels();
    std::atomic<std::uint64_t> total{0};
    for_each_slice(bytes, threads, [&](std::int64_t first, std::int64_t last) {
        total.fetch_xor(k.probe_read(static_cast<const char*>(a) + first, static_cast<const char*>(b) + first,
                                     last - first),
                        std::memory_order_relaxed);
    });
    return total;
}

void probe_write(const void* a, const void* b, void* to, std::int64_t bytes, int threads) {
    const Kernels& k = kernels();
    for_each_slice(bytes, threads, [&](std::int64_t first, std::int64_t last) {
        k.probe_write(static_cast<const char*>(a) + first, static_cast<const char*>(b) + first,
                      static_cast<char*>(to) + first, last - first);
    });
}

}  // namespace kl
