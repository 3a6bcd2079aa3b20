// What a block of the persistent kernel keeps in shared memory, and its products as an Op of
// matvec.cuh.
#pragma once

#include "cuda/kv_cache.cuh"
#include "cuda/rope.cuh"
#include "ops/persistent.h"

namespace flexidepth::cuda {

// The pages of a layer, whose cache has elements of T.
template <class T>
__device__ __forceinline__ KvPages pages_of_layer(const KvPages& first, int64_t layer) {
  KvPages pages = first;
  pages.layer_offset += static_cast<size_t>(layer * 2 * value_offset(first.layout)) * sizeof(T);
  return pages;
}

// Some of the batch's rows, in ascending order.
struct RowList {
  int32_t count;
  int32_t number[kMaxPersistentRows];
  float scale[kMaxPersistentRows];  // of what is added to the residual stream
};

struct PersistentState {
  LayerWeights layers[2];  // the present one and the next, layer i in i % 2
  RowList all;             // scales are 1
  RowList running;         // of the present layer, if it is routed
  RowList skipped;
  RowList logits;  // rows of which logits are wanted
  PackedMatrix lm_head;
  float gates[kMaxPersistentRows];
};

enum class ProductKind {
  kStore,    // y = W x + b
  kAdd,      // y += scale (W x + b)
  kGated,    // y = silu(W x + b) * (W' x + b')
  kProject,  // queries, keys and values: rotated, the latter two into the cache
};

// One product of a phase. W has elements of T. rows: null = there is no product.
template <class T>
struct Product {
  const PersistentArgs& args;
  ProductKind kind = ProductKind::kStore;
  const RowList* rows = nullptr;
  const float* x = nullptr;              // [batch, k]
  const float* norm = nullptr;           // [k]
  float* y = nullptr;                    // [batch, n]
  bool renumber = false;                 // y is [rows->count, n]
  bool scaled = true;                    // kAdd: by the rows' scales
  const PackedMatrix* w = nullptr;       // kProject: the queries'
  const PackedMatrix* second = nullptr;  // kGated: W'; kProject: the keys'
  const PackedMatrix* third = nullptr;   // kProject: the values'
  int64_t layer = 0;                     // kProject

  __device__ int64_t head_dim() const { return args.pages.layout.head_dim; }

  __device__ int64_t units() const {
    if (kind == ProductKind::kGated) return w->n;
    if (kind == ProductKind::kProject) return w->n / 2 + second->n / 2 + paired_units(third->n);
    return paired_units(w->n);
  }

  __device__ Pair<T> pair(int64_t unit) const {
    if (kind == ProductKind::kGated) return {weight_row<T>(*w, unit), weight_row<T>(*second, unit)};
    if (kind != ProductKind::kProject) return paired_rows<T>(*w, unit);
    if (unit < w->n / 2) return rotated_rows<T>(*w, unit, head_dim());
    unit -= w->n / 2;
    if (unit < second->n / 2) return rotated_rows<T>(*second, unit, head_dim());
    return paired_rows<T>(*third, unit - second->n / 2);
  }

  __device__ void store(int64_t unit, int64_t i, float ya, float yb) const {
    const int64_t row = rows->number[i];
    if (kind == ProductKind::kProject) return store_projected(unit, row, ya, yb);
    float* own = y + (renumber ? i : row) * w->n;
    if (kind == ProductKind::kGated) {
      const float g = ya + bias_of(*w, unit), u = yb + bias_of(*second, unit);
      own[unit] = g / (1.0f + expf(-g)) * u;
      return;
    }
    const int64_t n = paired_output(unit);
    write(own, i, n, ya);
    if (n + 8 < w->n) write(own, i, n + 8, yb);
  }

  __device__ void write(float* own, int64_t i, int64_t n, float sum) const {
    const float value = sum + bias_of(*w, n);
    own[n] =
        kind == ProductKind::kAdd ? fmaf(scaled ? rows->scale[i] : 1.0f, value, own[n]) : value;
  }

  __device__ void store_projected(int64_t unit, int64_t row, float ya, float yb) const {
    const bool queries = unit < w->n / 2;
    if (!queries) unit -= w->n / 2;
    const KvPages pages = pages_of_layer<T>(args.pages, layer);
    const int64_t position = args.positions[row];
    const int32_t sequence = args.sequences[row];
    if (!queries && unit >= second->n / 2) {
      const int64_t n = paired_output(unit - second->n / 2), behind = value_offset(pages.layout);
      store_cached_value<T>(pages, sequence, position, n, behind, ya + bias_of(*third, n));
      if (n + 8 < third->n)
        store_cached_value<T>(pages, sequence, position, n + 8, behind,
                              yb + bias_of(*third, n + 8));
      return;
    }
    const PackedMatrix& rotated = queries ? *w : *second;
    const int64_t n = rotated_output(unit, head_dim()), other = n + head_dim() / 2;
    ya += bias_of(rotated, n);
    yb += bias_of(rotated, other);
    rotate_pair(args.cos_sin + row * head_dim(), unit, head_dim(), ya, yb);
    if (queries) {
      y[row * w->n + n] = ya;
      y[row * w->n + other] = yb;
    } else {
      store_cached_value<T>(pages, sequence, position, n, 0, ya);
      store_cached_value<T>(pages, sequence, position, other, 0, yb);
    }
  }
};

}  // namespace flexidepth::cuda
