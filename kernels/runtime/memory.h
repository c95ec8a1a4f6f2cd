// Huge pages and non-temporal stores for memory that is about to be written.
#pragma once

#include <cstdint>

#include "api.h"

namespace kl {

// Asks for huge pages under memory that is about to be written for the first time: 4 KiB pages cost more
// time to be faulted in, one by one, than a whole gradient costs to compute.
void prefer_huge_pages(void* data, std::int64_t bytes);

// Whether the gradient of these logits, [size_a, size_b, columns], is worth non-temporal stores, which spare
// reading its lines first. A large one gets huge pages as well.
bool uses_non_temporal_stores(const Gradient& to, const Logits& logits, std::int64_t size_a,
                              std::int64_t size_b, std::int64_t columns);

}  // namespace kl
