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

enum class ProductKind {
  kStore,    // y = W x + b
  kAdd,      // y += scale (W x + b)
  kGated,    // y = silu(W x + b) * (W' x + b')
  kProject,  // queries, keys and values: rotated, the latter two into the cache
};

// One product of a phase. rows: null = there is none.
struct Product {
  ProductKind kind;
  bool renumber;  // y is [rows->count, n]
  bool scaled;    // kAdd: by the rows' scales
  const RowList* rows;
  const float* x;              // [batch, k]
  const float* norm;           // [k], null = as it is
  float* y;                    // [batch, n]
  const PackedMatrix* w;       // kProject: the queries'
  const PackedMatrix* second;  // kGated: W'; kProject: the keys'
  const PackedMatrix* third;   // kProject: the values'
  int64_t layer;               // kProject
};

struct PersistentState {
  LayerWeights layers[2];  // the present one and the next, layer i in i % 2
  RowList all;             // scales are 1
  RowList running;         // of the present layer, if it is routed
  RowList skipped;
  RowList logits;  // rows of which logits are wanted
  PackedMatrix lm_head;
  Product products[3];  // of a phase; the last one's matrix is the router's, of float32
  float gates[kMaxPersistentRows];
};

// A product as an Op of matvec.cuh. W has elements of T.
template <class T>
struct ProductOp {
  const Product& p;
  const PersistentArgs& args;

  __device__ int64_t head_dim() const { return args.pages.layout.head_dim; }

  __device__ int64_t units() const {
    if (p.kind == ProductKind::kGated) return p.w->n;
    if (p.kind == ProductKind::kProject)
      return p.w->n / 2 + p.second->n / 2 + paired_units(p.third->n);
    return paired_units(p.w->n);
  }

  __device__ Pair<T> pair(int64_t unit) const {
    if (p.kind == ProductKind::kGated)
      return {weight_row<T>(*p.w, unit), weight_row<T>(*p.second, unit)};
    if (p.kind != ProductKind::kProject) return paired_rows<T>(*p.w, unit);
    if (unit < p.w->n / 2) return rotated_rows<T>(*p.w, unit, head_dim());
    unit -= p.w->n / 2;
    if (unit < p.second->n / 2) return rotated_rows<T>(*p.second, unit, head_dim());
    return paired_rows<T>(*p.third, unit - p.second->n / 2);
  }

  __device__ void store(int64_t unit, int64_t i, float ya, float yb) const {
    const int64_t row = p.rows->number[i];
    if (p.kind == ProductKind::kProject) return store_projected(unit, row, ya, yb);
    float* own = p.y + (p.renumber ? i : row) * p.w->n;
    if (p.kind == ProductKind::kGated) {
      const float g = ya + bias_of(*p.w, unit), u = yb + bias_of(*p.second, unit);
      own[unit] = g / (1.0f + expf(-g)) * u;
      return;
    }
    const int64_t n = paired_output(unit);
    write(own, i, n, ya);
    if (n + 8 < p.w->n) write(own, i, n + 8, yb);
  }

  __device__ void write(float* own, int64_t i, int64_t n, float sum) const {
    const float value = sum + bias_of(*p.w, n);
    own[n] = p.kind == ProductKind::kAdd ? fmaf(p.scaled ? p.rows->scale[i] : 1.0f, value, own[n])
                                         : value;
  }

  __device__ void store_projected(int64_t unit, int64_t row, float ya, float yb) const {
    const bool queries = unit < p.w->n / 2;
    if (!queries) unit -= p.w->n / 2;
    const KvPages pages = pages_of_layer<T>(args.pages, p.layer);
    const int64_t position = args.positions[row];
    const int32_t sequence = args.sequences[row];
    if (!queries && unit >= p.second->n / 2) {
      const int64_t n = paired_output(unit - p.second->n / 2), behind = value_offset(pages.layout);
      store_cached_value<T>(pages, sequence, position, n, behind, ya + bias_of(*p.third, n));
      if (n + 8 < p.third->n)
        store_cached_value<T>(pages, sequence, position, n + 8, behind,
                              yb + bias_of(*p.third, n + 8));
      return;
    }
    const PackedMatrix& rotated = queries ? *p.w : *p.second;
    const int64_t n = rotated_output(unit, head_dim()), other = n + head_dim() / 2;
    ya += bias_of(rotated, n);
    yb += bias_of(rotated, other);
    rotate_pair(args.cos_sin + row * head_dim(), unit, head_dim(), ya, yb);
    if (queries) {
      p.y[row * p.w->n + n] = ya;
      p.y[row * p.w->n + other] = yb;
    } else {
      store_cached_value<T>(pages, sequence, position, n, 0, ya);
      store_cached_value<T>(pages, sequence, position, other, 0, yb);
    }
  }
};

}  // namespace flexidepth::cuda
