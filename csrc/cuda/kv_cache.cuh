// Where keys and values lie in a page: K, then V, each [kv_head][256 tokens][head_dim].
#pragma once

#include "cuda/device.cuh"
#include "ops/kv_cache.h"

namespace flexidepth::cuda {

template <class T>
__device__ __forceinline__ T* layer_of_page(const KvPages& pages, int32_t sequence, int64_t page) {
  return reinterpret_cast<T*>(pages.tables[sequence][page] + pages.layer_offset);
}

// A value as the cache keeps it. What is too large for float16 becomes its largest number: an
// infinity would make NaN of every row that does not even see it, by way of 0 times it.
template <class T>
__device__ __forceinline__ T cached(float value) {
  return from_float<T>(value);
}
template <>
__device__ __forceinline__ Float16 cached<Float16>(float value) {
  return from_float<Float16>(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value);
}

// Elements from the beginning of a layer to the key of a token; the value is `value_offset` behind
// it.
__device__ __forceinline__ int64_t key_offset(const KvLayout& layout, int64_t kv_head,
                                              int64_t slot) {
  return (kv_head * kPageTokens + slot) * layout.head_dim;
}
__device__ __forceinline__ int64_t value_offset(const KvLayout& layout) {
  return layout.num_kv_heads * kPageTokens * layout.head_dim;
}

// Output n of a token's keys, offset 0, or of its values, value_offset behind.
template <class T>
__device__ __forceinline__ void store_cached_value(const KvPages& pages, int32_t sequence,
                                                   int64_t position, int64_t n, int64_t offset,
                                                   float value) {
  const KvLayout& layout = pages.layout;
  const auto own = static_cast<uint32_t>(n), dims = static_cast<uint32_t>(layout.head_dim);
  const int64_t at = key_offset(layout, own / dims, position % kPageTokens) + own % dims + offset;
  layer_of_page<T>(pages, sequence, position / kPageTokens)[at] = cached<T>(value);
}

}  // namespace flexidepth::cuda
