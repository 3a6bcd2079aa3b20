// The outputs of ops/project.h as an Op of matvec.cuh.
#pragma once

#include "cuda/kv_cache.cuh"
#include "cuda/products.cuh"
#include "ops/project.h"

namespace flexidepth::cuda {

template <class T>
struct Projection {
  ProjectArgs args;
  // Where a block that lists its rows itself has their numbers, int32, in shared memory: as many
  // floats from its beginning; -1 = h lists them, if anyone does.
  int64_t list_at;

  __device__ int64_t first_units() const {
    return args.rotate_first ? args.first.n / 2 : paired_units(args.first.n);
  }
  __device__ int64_t units() const { return first_units() + args.k.n / 2 + paired_units(args.v.n); }

  // A rotated pair stands half a head apart.
  __device__ int64_t rotated_output(int64_t unit) const {
    const int64_t half = args.head_dim / 2;
    return unit / half * args.head_dim + unit % half;
  }

  __device__ Pair<T> rotated_pair(const PackedMatrix& w, int64_t unit) const {
    const int64_t n = rotated_output(unit);
    return {weight_row<T>(w, n), weight_row<T>(w, n + args.head_dim / 2)};
  }

  __device__ Pair<T> pair(int64_t unit) const {
    if (unit < first_units())
      return args.rotate_first ? rotated_pair(args.first, unit) : paired_rows<T>(args.first, unit);
    unit -= first_units();
    if (unit < args.k.n / 2) return rotated_pair(args.k, unit);
    return paired_rows<T>(args.v, unit - args.k.n / 2);
  }

  // Number of the batch's row that the call's row i is.
  __device__ int64_t batch_row(int64_t i) const {
    if (list_at < 0) return row_number(args.h, i);
    return reinterpret_cast<const int32_t*>(dev::shared_memory<float>() + list_at)[i];
  }

  __device__ void rotate(int64_t i, int64_t unit, float& a, float& b) const {
    const int64_t half = args.head_dim / 2, j = unit % half;
    const float* table = args.cos_sin.base + batch_row(i) * args.cos_sin.stride;
    const float c = table[j], s = table[half + j], before = a;
    a = before * c - b * s;
    b = b * c + before * s;
  }

  __device__ void store(int64_t unit, int64_t i, float ya, float yb) const {
    if (unit >= first_units()) return store_cached(unit - first_units(), i, ya, yb);
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
    const KvLayout& layout = args.pages.layout;
    const int64_t row = batch_row(i), position = args.positions[row];
    const int64_t at =
        key_offset(layout, n / args.head_dim, position % kPageTokens) + n % args.head_dim + offset;
    const int32_t sequence = args.sequences[row];
    const int64_t page = position / kPageTokens;
    switch (layout.dtype) {
      case DType::kFloat32:
        layer_of_page<float>(args.pages, sequence, page)[at] = value;
        break;
      case DType::kBFloat16:
        layer_of_page<BFloat16>(args.pages, sequence, page)[at] = cached<BFloat16>(value);
        break;
      case DType::kFloat16:
        layer_of_page<Float16>(args.pages, sequence, page)[at] = cached<Float16>(value);
        break;
    }
  }
};

}  // namespace flexidepth::cuda
