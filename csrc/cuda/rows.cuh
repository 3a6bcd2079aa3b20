// Rows of arguments, and of weights, as kernels see them.
#pragma once

#include "cuda/device.cuh"
#include "ops/rows.h"

namespace flexidepth::cuda {

// How many of the rows there are.
template <class Float>
__device__ __forceinline__ int64_t live_rows(const RowView<Float>& rows) {
  if (rows.live == nullptr) return rows.count;
  const int64_t live = *rows.live;
  return live < rows.count ? live : rows.count;
}

template <class Float>
__device__ __forceinline__ int64_t row_number(const RowView<Float>& rows, int64_t i) {
  return rows.index == nullptr ? i : rows.index[i];
}

template <class Float>
__device__ __forceinline__ Float* row_of(const RowView<Float>& rows, int64_t i) {
  return rows.base + row_number(rows, i) * rows.stride;
}

// Row n of a matrix of T.
template <class T>
__device__ __forceinline__ const T* weight_row(const PackedMatrix& matrix, int64_t n) {
  return reinterpret_cast<const T*>(matrix.data) + n * matrix.k;
}

__device__ __forceinline__ float bias_of(const PackedMatrix& matrix, int64_t n) {
  return matrix.bias == nullptr ? 0.0f : matrix.bias[n];
}

enum class From { kWeights, kCache };

template <From kFrom>
__device__ __forceinline__ Chunk load_chunk(const void* from) {
  if constexpr (kFrom == From::kWeights) return dev::load_once(from);
  return dev::load_written(from);
}

// Eight values in a row, by loads of 16 bytes; the address is a multiple of 16.
template <From kFrom = From::kWeights>
__device__ __forceinline__ void load_eight(const float* from, float (&out)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Chunk c = load_chunk<kFrom>(from + half * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[half * 4 + i] = dev::float_of(c.word[i]);
  }
}
template <From kFrom = From::kWeights, class T>
__device__ __forceinline__ void load_eight(const T* from, float (&out)[8]) {
  const Chunk c = load_chunk<kFrom>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float(T{static_cast<uint16_t>(c.word[i])});
    out[2 * i + 1] = to_float(T{static_cast<uint16_t>(c.word[i] >> 16)});
  }
}

}  // namespace flexidepth::cuda
