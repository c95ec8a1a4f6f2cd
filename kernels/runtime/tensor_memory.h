// Kept memory as DLPack has it: what a tensor library takes over, and gives back with the last view of it.
#pragma once

#include <cstdint>

#include "api.h"

namespace kl {

struct DLManagedTensor;

// New memory of this shape and these strides, of `dimensions` entries each. Throws std::bad_alloc.
DLManagedTensor* kept_tensor(const std::int64_t* shape, const std::int64_t* strides, int dimensions,
                             Dtype dtype);

// Frees one that nobody took over.
void free_tensor(DLManagedTensor* tensor) noexcept;

}  // namespace kl
