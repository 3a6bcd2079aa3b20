// Rotation of queries and keys: the table, and outputs of a matrix in the pairs that turn together.
#pragma once

#include "cuda/matvec.cuh"
#include "ops/rope.h"

namespace flexidepth::cuda {

// Angle j of row i.
__device__ __forceinline__ void rope_entry(const RopeTableArgs& args, int64_t i, int64_t j) {
  // The functions' accurate form: angles reach the length of the context.
  const float angle = static_cast<float>(args.positions[i]) * args.inv_freq[j];
  args.cos_sin[i * args.head_dim + j] = cosf(angle);
  args.cos_sin[i * args.head_dim + args.head_dim / 2 + j] = sinf(angle);
}

// A pair stands half a head apart: its first output. Numbers of outputs fit 32 bits, whose division
// is a few instructions where that of 64 is a hundred.
__device__ __forceinline__ int64_t rotated_output(int64_t unit, int64_t head_dim) {
  const auto own = static_cast<uint32_t>(unit), half = static_cast<uint32_t>(head_dim / 2);
  return own / half * static_cast<uint32_t>(head_dim) + own % half;
}

template <class T>
__device__ __forceinline__ Pair<T> rotated_rows(const PackedMatrix& w, int64_t unit,
                                                int64_t head_dim) {
  const int64_t n = rotated_output(unit, head_dim);
  return {weight_row<T>(w, n), weight_row<T>(w, n + head_dim / 2)};
}

// table: a row of cos_sin.
__device__ __forceinline__ void rotate_pair(const float* table, int64_t unit, int64_t head_dim,
                                            float& a, float& b) {
  const auto half = static_cast<uint32_t>(head_dim / 2), j = static_cast<uint32_t>(unit) % half;
  const float c = table[j], s = table[half + j], before = a;
  a = before * c - b * s;
  b = b * c + before * s;
}

}  // namespace flexidepth::cuda
