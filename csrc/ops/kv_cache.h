// Keys and values of every token, run or skipped, in pages of 256 tokens that hold all layers.
// On the CPU keys are panels of 16 tokens over head_dim and values are panels of 16 dimensions over
// the page's tokens (panel layout of cpu/kernels.h), so that both products of attention are the
// same inner loop as a linear layer:
//   K  [kv_head][16 token blocks] panels of k = head_dim
//   V  [kv_head][ceil(head_dim / 16)] panels of k = 256
// With CUDA both are K, V [kv_head][256 tokens][head_dim].
#pragma once

#include "ops/rows.h"

namespace flexidepth {

constexpr int64_t kPageTokens = 256;

struct KvLayout {
  DType dtype;
  int64_t num_kv_heads;
  int64_t head_dim;

  int64_t value_panels() const { return (head_dim + 15) / 16; }
  size_t key_panel_bytes() const;
  size_t value_panel_bytes() const;
  // Offsets inside one layer of a page.
  size_t key_offset(int64_t kv_head, int64_t block) const;
  size_t value_offset(int64_t kv_head, int64_t panel) const;
  size_t layer_bytes() const;
};

// One layer of the caches of some sequences.
struct KvPages {
  KvLayout layout;
  uint8_t* const* const* tables;  // [sequence][page]: a page of 256 tokens, all layers
  size_t layer_offset;            // bytes from a page's start to this layer
};

struct KvAppendArgs {
  KvPages pages;
  Rows k;                    // [rows, num_kv_heads * head_dim], rotated
  Rows v;                    // [rows, num_kv_heads * head_dim]
  const int64_t* positions;  // [rows]
  const int32_t* sequences;  // [rows]
};

namespace cpu {
void kv_append(const KvAppendArgs& args, const Context& context);
}
namespace cuda {
// Bytes of one layer in a page.
size_t kv_layer_bytes(const KvLayout& layout);
void kv_append(const KvAppendArgs& args, const Context& context);
}  // namespace cuda

}  // namespace flexidepth
