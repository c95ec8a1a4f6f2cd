// Which instruction set runs.
#pragma once

#include "isa/kernels.h"

namespace kl {

// Chosen once, by what the processor can do or by KL_GPU_ISA. Throws std::runtime_error where that
// names a set that is unknown or that this processor lacks.
const Kernels& kernels();

}  // namespace kl
