// Which instruction set the CPU ops use: the best this processor has, or the one that the
// environment variable FLEXIDEPTH_ISA names (generic, avx2, avx512, avx512bf16).
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace flexidepth::cpu {

// Names this build contains and this processor can run, plainest first.
std::vector<std::string> available_isas();

// Throws Error(kUnsupported) for a name that is unknown, not built, or not runnable here.
const Kernels* kernels_for(const std::string& isa);

// FLEXIDEPTH_ISA if set, else the last of available_isas(). avx512bf16 rounds activations to
// bfloat16 where weights are bfloat16; name avx512 to keep them in float32.
const Kernels* default_kernels();

}  // namespace flexidepth::cpu
