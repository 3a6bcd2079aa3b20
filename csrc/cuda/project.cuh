// The outputs of ops/project.h as an Op of matvec.cuh.
#pragma once

#include "cuda/kv_cache.cuh"
#include "cuda/products.cuh"
#include "cuda/rope.cuh"
#include "ops/project.h"

namespace flexidepth::cuda {

template <class T>
struct Projection {
  static constexpr bool kOftenFew = false;

  ProjectArgs args;
  // Where a block that lists its rows itself has their numbers, int32, in shared memory: as many
  // floats from its beginning; -1 = h lists them, if anyone does.
  int64_t list_at;

  __device__ int64_t first_units() const {
    return args.rotate_first ? args.first.n / 2 : paired_units(args.first.n);
  }
  __device__ int64_t cached_units() const { return args.k.n / 2 + paired_units(args.v.n); }
  __device__ int64_t units() const { return cached_units() + first_units(); }

  __device__ int64_t rotated_output(int64_t unit) const {
    return cuda::rotated_output(unit, args.head_dim);
  }

  __device__ Pair<T> rotated_pair(const PackedMatrix& w, int64_t unit) const {
    return rotated_rows<T>(w, unit, args.head_dim);
  }

  // Keys and values come first: what is stored of them takes the longest way.
  __device__ Pair<T> pair(int64_t unit) const {
    if (unit < args.k.n / 2) return rotated_pair(args.k, unit);
    if (unit < cached_units()) return paired_rows<T>(args.v, unit - args.k.n / 2);
    unit -= cached_units();
    return args.rotate_first ? rotated_pair(args.first, unit) : paired_rows<T>(args.first, unit);
  }

  // Number of the batch's row that the call's row i is.
  __device__ int64_t batch_row(int64_t i) const {
    if (list_at < 0) return row_number(args.h, i);
    return reinterpret_cast<const int32_t*>(dev::shared_memory<float>() + list_at)[i];
  }

  __device__ void rotate(int64_t i, int64_t unit, float& a, float& b) const {
    const float* table = args.cos_sin.base + batch_row(i) * args.cos_sin.stride;
    rotate_pair(table, unit, args.head_dim, a, b);
  }

  __device__ void store(int64_t unit, int64_t i, float ya, float yb) const {
    if (unit < cached_units()) return store_cached(unit, i, ya, yb);
    unit -= cached_units();
    const PackedMatrix& w = args.first;
    float* y = row_of(args.first_out, i);
    const int64_t n = args.rotate_first ? rotated_output(unit) : paired_output(unit);
    const int64_t other = n + (args.rotate_first ? args.head_dim / 2 : 8);
    ya += bias_of(w, n);
    if (other < w.n) yb += bias_of(w, other);
    if (args.rotate_first) rotate(i, unit, ya, yb);
    y[n] = ya;
    if (other < w.n) y[other] = yb;
  }

  __device__ void store_cached(int64_t unit, int64_t i, float ya, float yb) const {
    if (unit < args.k.n / 2) {
      const int64_t n = rotated_output(unit), other = n + args.head_dim / 2;
      ya += bias_of(args.k, n);
      yb += bias_of(args.k, other);
      rotate(i, unit, ya, yb);
      cache(i, n, ya, 0);
      cache(i, other, yb, 0);
    } else {
      const int64_t n = paired_output(unit - args.k.n / 2);
      cache(i, n, ya + bias_of(args.v, n), value_offset(args.pages.layout));
      if (n + 8 < args.v.n)
        cache(i, n + 8, yb + bias_of(args.v, n + 8), value_offset(args.pages.layout));
    }
  }

  // Output n of the keys, or, value_offset behind them, of the values.
  __device__ void cache(int64_t i, int64_t n, float value, int64_t offset) const {
    const KvPages& pages = args.pages;
    const int64_t row = batch_row(i), position = args.positions[row];
    const int32_t sequence = args.sequences[row];
    switch (pages.layout.dtype) {
      case DType::kFloat32:
        store_cached_value<float>(pages, sequence, position, n, offset, value);
        break;
      case DType::kBFloat16:
        store_cached_value<BFloat16>(pages, sequence, position, n, offset, value);
        break;
      case DType::kFloat16:
        store_cached_value<Float16>(pages, sequence, position, n, offset, value);
        break;
    }
  }
};

}  // namespace flexidepth::cuda
