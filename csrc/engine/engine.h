// The forward pass of a FlexiDepth model on the CPU. Decoding is a pass with one row a sequence, a
// prompt is a pass with many rows of one sequence: the same code, the same bits.
//
// A routed layer, per token (docs/architecture.md has the maths):
//   x = norm(h);  [router, K, V] = x W in one phase;  K, V into the cache for every token
//   gate -> threshold -> compaction
//   running rows: Q, attention, O, feed-forward scaled by w     skipped rows: adapter scaled by 1 -
//   w
// What no row needs is not read.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "cpu/context.h"
#include "engine/batch.h"
#include "engine/scratch.h"
#include "engine/stopwatch.h"
#include "engine/weights.h"

namespace flexidepth {

class Engine {
 public:
  // isa: a name of cpu/isa.h, or empty for the default.
  Engine(const ModelShape& shape, int num_threads, int64_t max_rows, const std::string& isa);

  const ModelShape& shape() const { return shape_; }
  int num_threads() const { return pool_.size(); }
  const char* isa() const { return kernels_.name; }
  size_t weight_bytes() const { return weights_ == nullptr ? 0 : weights_->bytes(); }

  void set_weight(const std::string& name, const void* source, DType dtype, int64_t rows,
                  int64_t columns);
  void finish_loading();

  std::unique_ptr<KvCache> new_cache(int64_t max_length) const;

  // Appends the batch's tokens to their caches and computes the asked logits. On an error nothing
  // has changed. Throws Error(kBusy) when another thread is inside, Error(kClosed) after close().
  void forward(const Batch& batch);

  // The engine's threads and kernels for an op outside a pass (sampling).
  cpu::Context context() { return {pool_, kernels_}; }

  // Counts the time of passes by part from now on, or no longer.
  void record_times(bool on) { stopwatch_.record(on); }
  const Stopwatch& times() const { return stopwatch_; }

  void poison_scratch() { scratch_->poison(); }
  // Gives weights and scratch back to the system. The engine cannot be used afterwards.
  void close();
  bool closed() const { return weights_ == nullptr; }

 private:
  class Guard;

  void validate(const Batch& batch) const;
  void embed(const Batch& batch);
  void prepare_rows(const Batch& batch);
  void plain_layer(const Batch& batch, int64_t index, const LayerWeights& layer);
  void routed_layer(const Batch& batch, int64_t index, const LayerWeights& layer);
  int64_t route(const Batch& batch, const LayerWeights& layer);
  void append(const Batch& batch, int64_t layer);
  KvPages pages_of(const Batch& batch, int64_t layer) const;
  void attend(const Batch& batch, int64_t layer_index, const LayerWeights& layer, int64_t rows,
              const int32_t* index);
  void norm(const float* weight, const float* from, int64_t rows);
  void finish(const Batch& batch);

  ModelShape shape_;
  int64_t max_rows_;
  cpu::ThreadPool pool_;
  const cpu::Kernels& kernels_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<Scratch> scratch_;
  std::vector<uint8_t* const*> page_tables_;
  Stopwatch stopwatch_;
  bool ready_ = false;
  std::atomic<bool> busy_{false};
};

}  // namespace flexidepth
