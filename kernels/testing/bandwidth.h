// What the memory of this machine gives to code that does nothing else: the yardstick of bench/.
#pragma once

#include <cstdint>

namespace kl {

// Reads both buffers once. The result keeps the compiler from dropping the reads.
std::uint64_t probe_read(const void* a, const void* b, std::int64_t bytes, int threads);

// Reads both and writes a third with non-temporal stores: to = a ^ b. All three aligned to 64 bytes.
void probe_write(const void* a, const void* b, void* to, std::int64_t bytes, int threads);

}  // namespace kl
