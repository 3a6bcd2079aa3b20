// The first half of a gated MLP as an Op of matvec.cuh.
#pragma once

#include "cuda/products.cuh"
#include "ops/gated_mlp.h"

namespace flexidepth::cuda {

// A pair is one row of W_gate and the same of W_up.
template <class T>
struct Activation {
  static constexpr bool kOftenFew = true;

  PackedMatrix gate;
  PackedMatrix up;
  float* activation;  // [rows, width]

  __device__ int64_t units() const { return gate.n; }

  __device__ Pair<T> pair(int64_t unit) const {
    return {weight_row<T>(gate, unit), weight_row<T>(up, unit)};
  }

  __device__ void store(int64_t unit, int64_t row, float sum_gate, float sum_up) const {
    const float g = sum_gate + bias_of(gate, unit), u = sum_up + bias_of(up, unit);
    activation[row * gate.n + unit] = g / (1.0f + expf(-g)) * u;
  }
};

}  // namespace flexidepth::cuda
