#include "runtime/tensor_memory.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <vector>

#include "runtime/kept_memory.h"

namespace kl {

// DLPack 0.x, the layout that a capsule named "dltensor" holds (dlpack.h of github.com/dmlc/dlpack).
struct DLManagedTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t dimensions;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
    void* context;
    void (*deleter)(DLManagedTensor*);
};
static_assert(offsetof(DLManagedTensor, code) == 20 && offsetof(DLManagedTensor, shape) == 24 &&
              offsetof(DLManagedTensor, deleter) == 56 && sizeof(void*) == 8);

namespace {

constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kFloat = 2, kBfloat = 4;

struct Owner {
    DLManagedTensor tensor;
    std::vector<std::int64_t> sizes;  // shape, then strides
    KeptBlock* block;
};

// Called by whichever thread drops the last view, without Python's lock, and when the process ends.
void give_back_tensor(DLManagedTensor* tensor) {
    auto* owner = static_cast<Owner*>(tensor->context);
    give_back(owner->block);
    delete owner;
}

}  // namespace

DLManagedTensor* kept_tensor(const std::int64_t* shape, const std::int64_t* strides, int dimensions,
                             Dtype dtype) {
    auto owner = std::make_unique<Owner>();
    owner->sizes.assign(shape, shape + dimensions);
    owner->sizes.insert(owner->sizes.end(), strides, strides + dimensions);
    std::int64_t last = 0;
    for (int i = 0; i < dimensions; ++i) last += (shape[i] - 1) * strides[i];
    owner->block = take_block((last + 1) * size_of(dtype));
    std::int64_t* const sizes = owner->sizes.data();
    owner->tensor = {owner->block->data,
                     kCpu,
                     0,
                     dimensions,
                     dtype == Dtype::bf16 ? kBfloat : kFloat,
                     static_cast<std::uint8_t>(8 * size_of(dtype)),
                     1,
                     sizes,
                     sizes + dimensions,
                     0,
                     owner.get(),
                     give_back_tensor};
    return &owner.release()->tensor;
}

void free_tensor(DLManagedTensor* tensor) noexcept { tensor->deleter(tensor); }

}  // namespace kl
