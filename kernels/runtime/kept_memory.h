// Memory for large gradients that is kept when it is given back, for the next one: pages that the system
// takes back and clears anew for every training step cost more time than the gradient in them takes to
// compute.
#pragma once

#include <cstdint>

namespace kl {

struct KeptBlock {
    void* data;
    std::int64_t bytes;
};

// What a call holds, and what lies idle.
struct KeptUse {
    std::int64_t taken, idle, idle_blocks;
};

// A block of at least so many bytes, 2 MiB aligned, whose contents mean nothing. Nobody else has it until it
// is given back. Any thread may take and give back. Throws std::bad_alloc.
KeptBlock* take_block(std::int64_t bytes);
void give_back(KeptBlock* block) noexcept;

// How many bytes may lie idle; -1 for twice the largest block that was asked for, 4 GiB at most. 0 keeps
// none.
void limit_idle_bytes(std::int64_t bytes);

// Gives all that lies idle back to the system, and forgets how large blocks were.
void release_idle_blocks();

KeptUse kept_use();

}  // namespace kl
