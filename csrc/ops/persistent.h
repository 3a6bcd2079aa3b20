// A whole decoding pass, from the embedding to the logits, as one kernel whose blocks stay: they
// walk through the layers together, phase by phase, with a barrier of the grid between two phases.
// For small models, where a phase is so short that launching a kernel for it costs more.
//
// A routed layer (docs/architecture.md has the maths):
//   [router code; Q; K; V] of every row, K and V into the cache
//   gates and decisions by every block for itself; attention of the rows that run, the first half
//     of the adapter for the others
//   O and the residual of the former, the second half of the adapter of the latter
//   the two halves of the feed-forward, where any row runs: otherwise the blocks pass on at once
// Sums have the order of the ops that make a pass of many kernels, and so the results their bits.
#pragma once

#include "ops/kv_cache.h"
#include "ops/layer_weights.h"
#include "ops/router.h"

namespace flexidepth {

constexpr int64_t kMaxPersistentRows = 8;

// Every address is the device's.
struct PersistentArgs {
  const LayerWeights* layers;  // [num_layers], routers folded
  int64_t num_layers;
  int64_t num_routed;
  PackedMatrix embedding;  // [vocab, d]
  const float* final_norm;
  PackedMatrix lm_head;
  int64_t num_heads;
  int64_t intermediate_size;
  int64_t router_dim;
  int64_t adapter_dim;
  int64_t sliding_window;  // 0 = none
  float eps;
  float attention_scale;
  RouterOrder order;
  KvPages pages;  // of the first layer
  const float* inv_freq;

  int64_t rows;                // one a sequence, at most kMaxPersistentRows
  const int32_t* token_ids;    // [rows]
  const int64_t* positions;    // [rows]
  const int32_t* sequences;    // [rows]
  int64_t max_pages;           // most pages that a row's past reaches
  bool dense;                  // every layer runs, routers are not evaluated
  bool unit_scales;            // outputs are not weighted by gates
  const uint8_t* forced;       // [rows, num_routed], nonzero = run; null = the gates decide
  const float* thresholds;     // [num_routed]
  const int32_t* logits_rows;  // [num_logits], null = rows 0, 1, ...
  int64_t num_logits;
  float* logits;  // [num_logits, vocab]
  float* gates;   // [rows, num_routed]; dense: not written
  uint8_t* ran;   // [rows, num_routed]; dense: not written

  // Scratch. Rows are not compacted: each keeps its place.
  float* h;           // [rows, d]
  float* q;           // [rows, query width]
  float* attention;   // [rows, query width]
  float* encoded;     // [rows, router_dim]
  float* activation;  // [rows, max(intermediate_size, adapter_dim)]
  float* cos_sin;     // [rows, head_dim]
  float* partials;    // attention_scratch_floats()
  int32_t* counters;  // attention_counters(), 0 before and after
  uint32_t* barrier;  // one number, 0 before the first pass
};

namespace cuda {
void persistent_pass(const PersistentArgs& args, const Context& context);
}

}  // namespace flexidepth
