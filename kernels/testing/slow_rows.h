// How many rows have left the fast path so far, for the test that says which ones must not.
#pragma once

#include <atomic>
#include <cstdint>

namespace kl {

inline std::atomic<std::int64_t> slow_rows{0};

}  // namespace kl
