// y = x W^T + bias for up to three matrices that share their input, in one phase.
//   store:       y[i, j]  = sum_k x[i, k] W[j, k] + b[j]
//   accumulate:  y[i, j] += scale[i] * (sum_k x[i, k] W[j, k] + b[j])
// float32 accumulation in an order that depends on k alone (see PanelDot), whatever the rows or
// threads.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct LinearOutput {
  PackedMatrix weight;
  MutableRows y;  // count = rows of x
  bool accumulate = false;
  const float* scale = nullptr;  // [rows], accumulate only; null = 1
};

constexpr int kMaxLinearOutputs = 3;

struct LinearArgs {
  Rows x;
  LinearOutput outputs[kMaxLinearOutputs];
  int num_outputs = 1;  // CUDA: 1
};

namespace cpu {
void linear(const LinearArgs& args, const Context& context);
}
namespace cuda {
void linear(const LinearArgs& args, const Context& context);
}

}  // namespace flexidepth
