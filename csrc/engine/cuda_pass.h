// The forward pass of a FlexiDepth model on CUDA: queues the kernels of a pass on a stream and
// waits for nothing. What the device decides, which rows run a layer, never leaves it: kernels that
// find no row read no weights. So the same launches serve every decision, and a graph can hold
// them.
//
// A routed layer, up to 8 rows, in six launches (docs/architecture.md has the maths):
//   router_code   of every row; K's and V's weights come closer meanwhile
//   routed_entry  gates and decisions by every block for itself; K and V of every row into the
//                 cache, Q of the running rows, the adapter's first half of the skipped ones
//   attention, linear (O), feed_forward (its first half) of the running rows
//   routed_exit   the second halves of the feed-forward and of the adapter
// Beyond 8 rows, and with a strict router, gates and decisions are phases of their own, and the
// adapter follows the feed-forward.
// Decoding steps can also be one kernel for all of it (ops/persistent.h), with the same bits.
#pragma once

#include "cuda/context.h"
#include "engine/cuda_weights.h"
#include "engine/routing.h"
#include "ops/persistent.h"

namespace flexidepth {

// What a pass takes and gives. Every address is the device's, and read when the kernels run.
struct CudaBatch {
  int64_t rows = 0;
  bool prompt = false;                      // many rows of a sequence, not one each
  const int32_t* token_ids = nullptr;       // [rows], inside the vocabulary
  const int64_t* positions = nullptr;       // [rows]
  const int32_t* sequences = nullptr;       // [rows]: which page table
  uint8_t* const* const* tables = nullptr;  // [sequence][page]: a page of 256 tokens, all layers
  int64_t max_pages = 0;                    // most pages that a row's past reaches
  Routing routing = Routing::kRouter;
  const uint8_t* mask = nullptr;         // [rows, num_routed], forced routing: nonzero = run
  const float* thresholds = nullptr;     // [num_routed]
  const int32_t* logits_rows = nullptr;  // [num_logits], null = rows 0, 1, ...
  int64_t num_logits = 0;
  float* logits = nullptr;   // [num_logits, vocab]
  float* gates = nullptr;    // [rows, num_routed]; dense: not written
  uint8_t* ran = nullptr;    // [rows, num_routed]; dense: not written
  void* scratch = nullptr;   // CudaPass::scratch_bytes(), 0 before the first pass
  int64_t scratch_rows = 0;  // rows, and pages, that it has room for
  int64_t scratch_pages = 0;
  // Weights of each routed layer that are brought into the L2 cache before it is decided whether
  // they are needed (up to 8 rows).
  int64_t prefetch_bytes = 0;
  bool persistent = false;  // as one kernel: up to 8 rows, one a sequence, and no strict router
};

class CudaPass {
 public:
  // inv_freq: [head_dim / 2] in device memory.
  CudaPass(const ModelShape& shape, const float* inv_freq);

  const ModelShape& shape() const { return shape_; }
  CudaWeights& weights() { return weights_; }

  // Bytes of the buffers of passes of up to so many rows and pages.
  size_t scratch_bytes(int64_t rows, int64_t max_pages, bool prompt) const;
  // Bytes of a page of the cache: 256 tokens, all layers.
  size_t page_bytes() const;

  // For persistent passes a copy of the layers' addresses lies on the device. All weights set: its
  // bytes, the copy into host memory, and where the caller has put it.
  size_t layer_table_bytes() const;
  void write_layer_table(void* to) const;
  void set_layer_table(const void* on_device);

  // Queues the pass. Throws Error where a launch is refused.
  void run(const CudaBatch& batch, const cuda::Context& context) const;

 private:
  struct Scratch;
  class Run;

  PersistentArgs persistent(const CudaBatch& batch) const;
  Scratch lay_out(void* base, int64_t rows, int64_t max_pages, bool prompt) const;
  KvLayout cache_layout() const { return {shape_.dtype, shape_.num_kv_heads, shape_.head_dim}; }

  ModelShape shape_;
  const float* inv_freq_;
  CudaWeights weights_;
  const LayerWeights* layer_table_ = nullptr;
};

}  // namespace flexidepth
