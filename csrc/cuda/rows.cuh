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

// Whether all begin where 16 bytes can be loaded; null does.
template <class... Pointers>
__host__ __device__ __forceinline__ bool aligned(const Pointers*... at) {
  return ((reinterpret_cast<uintptr_t>(at) % sizeof(Chunk) == 0) && ...);
}

enum class From { kWeights, kCache };

template <From kFrom>
__device__ __forceinline__ Chunk load_chunk(const void* from) {
  if constexpr (kFrom == From::kWeights) return dev::load_once(from);
  return dev::load_written(from);
}

// Eight values in a row as they lie in memory, at a multiple of 16 bytes.
template <class T>
struct Eight {
  Chunk chunk[sizeof(T) / 2];
};

template <From kFrom = From::kWeights, class T>
__device__ __forceinline__ Eight<T> fetch_eight(const T* from) {
  Eight<T> eight;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 2; ++i)
    eight.chunk[i] = load_chunk<kFrom>(from + i * (sizeof(Chunk) / sizeof(T)));
  return eight;
}

// Where they are wanted, else zeros.
template <From kFrom = From::kWeights, class T>
__device__ __forceinline__ Eight<T> fetch_eight_if(bool wanted, const T* from) {
  Eight<T> eight;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 2; ++i) {
    const T* at = from + i * (sizeof(Chunk) / sizeof(T));
    eight.chunk[i] =
        kFrom == From::kWeights ? dev::load_once_if(wanted, at) : dev::load_written_if(wanted, at);
  }
  return eight;
}

__device__ __forceinline__ void unpack(const Eight<float>& eight, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = dev::float_of(eight.chunk[i / 4].word[i % 4]);
}
template <class T>
__device__ __forceinline__ void unpack(const Eight<T>& eight, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = eight.chunk[0].word[i];
    out[2 * i] = to_float(T{static_cast<uint16_t>(two)});
    out[2 * i + 1] = to_float(T{static_cast<uint16_t>(two >> 16)});
  }
}

template <From kFrom = From::kWeights, class T>
__device__ __forceinline__ void load_eight(const T* from, float (&out)[8]) {
  unpack(fetch_eight<kFrom>(from), out);
}

}  // namespace flexidepth::cuda
