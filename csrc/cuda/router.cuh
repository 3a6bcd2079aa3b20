// A row's gate out of its code e, by one warp.
#pragma once

#include "cuda/rows.cuh"
#include "ops/router.h"

namespace flexidepth::cuda {

// What Norm multiplies the code by before its weight: of e, or of tanh(e) where tanh comes first.
__device__ __forceinline__ float code_factor(const RouterGateArgs& args, const float* e) {
  float sum = 0.0f;
  for (int64_t j = dev::thread() % kWarp; j < args.router_dim; j += kWarp) {
    const float value = args.order == RouterOrder::kNormTanh ? e[j] : tanhf(e[j]);
    sum = fmaf(value, value, sum);
  }
  return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(args.router_dim) + args.eps);
}

__device__ __forceinline__ float code_value(const RouterGateArgs& args, float e, float factor,
                                            int64_t j) {
  if (args.order == RouterOrder::kNormTanh) return tanhf(e * factor * args.norm[j]);
  return tanhf(e) * factor * args.norm[j];
}

__device__ __forceinline__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

__device__ __forceinline__ float folded_gate(const RouterGateArgs& args, const float* e) {
  const float factor = code_factor(args, e);
  float logit = 0.0f;
  for (int64_t j = dev::thread() % kWarp; j < args.router_dim; j += kWarp)
    logit = fmaf(code_value(args, e[j], factor, j), args.folded[j], logit);
  return sigmoid(warp_sum(logit) + args.bias);
}

}  // namespace flexidepth::cuda
