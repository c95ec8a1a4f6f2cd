// Loops over threads, for one caller at a time or for several at once.
#pragma once

#include <cstdint>

namespace kl {

using Task = void (*)(void* context, std::int64_t item);

// Runs task(context, i) for every i in [0, items) on up to `threads` threads, the caller among them,
// and returns when all are done. May be called from several threads at once, and in a child after
// fork: a child starts with no helpers, whatever the parent had. Tasks must not throw.
void parallel_for(std::int64_t items, int threads, Task task, void* context);

template <class F>
void parallel_for(std::int64_t items, int threads, F f) {
    parallel_for(items, threads, [](void* c, std::int64_t i) { (*static_cast<F*>(c))(i); }, &f);
}

}  // namespace kl
