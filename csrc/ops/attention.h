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
  KvPages pages;
  Rows q;           // [rows, num_heads * head_dim], rotated; compacted
  MutableRows out;  // [rows, num_heads * head_dim]
  int64_t num_heads;
  const int64_t* positions;  // [rows]
  const int32_t* sequences;  // [rows]: which page table; rows of one sequence stand together
  const int32_t* index;  // [rows]: row i has position and sequence number index[i]; null = number i
  int64_t sliding_window;  // 0 = none
  float scale;
  float* scratch;  // attention_scratch_floats()
  // CUDA: most pages of a sequence, and a counter for each row and group of heads, all 0 before and
  // after (attention_counters()).
  int64_t max_pages = 0;
  int32_t* counters = nullptr;
  // CUDA: many rows of a sequence, as in a prompt. 16-bit caches then go through the tensor cores,
  // 64 rows at a time, and scratch and counters are not used.
  bool prompt = false;

  int64_t position(int64_t row) const { return positions[index == nullptr ? row : index[row]]; }
  int32_t sequence(int64_t row) const { return sequences[index == nullptr ? row : index[row]]; }
};

namespace cpu {
size_t attention_scratch_floats(int64_t head_dim);
void attention(const AttentionArgs& args, const Context& context);
}  // namespace cpu
namespace cuda {
size_t attention_scratch_floats(int64_t rows, int64_t num_heads, int64_t head_dim,
                                int64_t max_pages);
size_t attention_counters(int64_t rows, int64_t num_heads);
// head_dim: a multiple of 8 up to 128.
void attention(const AttentionArgs& args, const Context& context);
}  // namespace cuda

}  // namespace flexidepth
