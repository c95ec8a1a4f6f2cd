// Threads for one call at a time or for several at once.
#pragma once

#include <cstdint>

namespace kl {

using Task = void (*)(void* context, std::int64_t item);

// Runs task(context, i) for every i in [0, items) on up to `threads` threads, the caller among them,
// and returns when all are done. May be called from several threads at once, and in a child after
// fork: a child starts with no helpers, whatever the parent had. Tasks must not throw.
void run_items(std::int64_t items, int threads, Task task, void* context);

}  // namespace kl
