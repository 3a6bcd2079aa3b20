// Causal attention in which only the running queries take part; each query row carries its own
// position.
//   s_t = scale * q . k_t  for t in (position - window, position];  out = sum_t softmax(s)_t v_t
// Pages are reduced one after the other by the streaming softmax
//   m' = max(m, m_c), l' = l e^(m - m') + l_c e^(m_c - m'), o' likewise, out = o / l
// so that a row's result depends on its position and the cache alone, not on the other rows.
#pragma once

#include "ops/kv_cache.h"

namespace flexidepth {

constexpr int64_t kMaxHeadDim = 256;

struct AttentionArgs {
  KvLayout layout;
  Rows q;           // [rows, num_heads * head_dim], rotated; compacted
  MutableRows out;  // [rows, num_heads * head_dim]
  int64_t num_heads;
  const int64_t* positions;  // [rows]
  const int32_t* sequences;  // [rows]: which page table; rows of one sequence stand together
  uint8_t* const* const* page_tables;  // [sequence][page]: page of 256 tokens, all layers
  size_t layer_offset;                 // bytes from a page's start to this layer
  int64_t sliding_window;              // 0 = none
  float scale;
  float* scratch;  // attention_scratch_floats()
};

namespace cpu {
size_t attention_scratch_floats(int64_t head_dim);
void attention(const AttentionArgs& args, const Context& context);
}  // namespace cpu

}  // namespace flexidepth
