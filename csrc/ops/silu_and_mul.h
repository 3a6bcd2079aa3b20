// The middle of a gated MLP whose products a library has computed, in their 16-bit type:
//   y[m, j] = silu(gate[m, j] + b_gate[j]) * (up[m, j] + b_up[j]),  silu(x) = x / (1 + e^-x)
// in float32, rounded once.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct SiluAndMulArgs {
  const void* gate;  // [rows, width]
  const void* up;    // [rows, width]
  void* y;           // [rows, width]
  DType dtype;
  int64_t rows;
  int64_t width;
  const float* gate_bias;  // [width], or null
  const float* up_bias;    // [width], or null
};

namespace cuda {
void silu_and_mul(const SiluAndMulArgs& args, const Context& context);
}

}  // namespace flexidepth
