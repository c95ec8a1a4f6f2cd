// How memory that is about to be written is written best.
#pragma once

#include <cstdint>

#include "contract.h"

namespace kl {

// Asks for large pages under memory that is about to be written for the first time: 4 KiB pages cost more
// time to be faulted in, one by one, than a whole gradient costs to compute.
void prefer_large_pages(void* data, std::int64_t bytes);

// Whether the gradient of these logits, [size_a, size_b, columns], is stored past the cache, so that its
// lines are not read first. A large one gets large pages as well.
bool stores_past_cache(const Gradient& to, const Logits& logits, std::int64_t size_a, std::int64_t size_b,
                       std::int64_t columns);

}  // namespace kl
