#pragma once

#include <cstdint>

namespace kl {

// Asks for large pages under memory that is about to be written for the first time: 4 KiB pages cost more
// time to be faulted in, one by one, than a whole gradient costs to compute.
void prefer_large_pages(void* data, std::int64_t bytes);

}  // namespace kl
