// What a library's product adds to the residual stream, in its 16-bit type:
//   h[index[i], j] += scale[i] * (y[i, j] + b[j])
// in float32. No row is listed twice.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct ResidualAddArgs {
  const void* y;  // [rows, d]
  DType dtype;
  MutableRows h;       // [rows, d] of the listed rows
  const float* bias;   // [d], or null
  const float* scale;  // [rows], or null = 1
};

namespace cuda {
void residual_add(const ResidualAddArgs& args, const Context& context);
}

}  // namespace flexidepth
