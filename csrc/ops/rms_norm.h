// RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, per row, in float32.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct RmsNormArgs {
  Rows x;               // [rows, width]
  MutableRows y;        // [rows, width]; may be x itself
  const float* weight;  // [width]
  int64_t width;
  float eps;
};

namespace cpu {
void rms_norm(const RmsNormArgs& args, const Context& context);
}
namespace cuda {
void rms_norm(const RmsNormArgs& args, const Context& context);
}

}  // namespace flexidepth
