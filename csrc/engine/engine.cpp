#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "cpu/isa.h"
#include "ops/adapter.h"
#include "ops/attention.h"
#include "ops/compact.h"
#include "ops/feed_forward.h"
#include "ops/linear.h"
#include "ops/lm_head.h"
#include "ops/pack.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/router.h"

namespace flexidepth {

// Marks the engine busy for the length of a call.
class Engine::Guard {
 public:
  explicit Guard(Engine& engine) : engine_(engine) {
    check(!engine_.busy_.exchange(true), ErrorKind::kBusy,
          "engine: another thread is using this engine; one engine serves one thread at a time");
  }
  ~Guard() { engine_.busy_.store(false); }

 private:
  Engine& engine_;
};

Engine::Engine(const ModelShape& shape, int num_threads, int64_t max_rows, const std::string& isa)
    : shape_(shape),
      max_rows_(max_rows),
      pool_(num_threads),
      kernels_(isa.empty() ? *cpu::default_kernels() : *cpu::kernels_for(isa)),
      weights_(std::make_unique<Weights>(shape)),
      scratch_(std::make_unique<Scratch>(shape, max_rows)) {}

void Engine::set_weight(const std::string& name, const void* source, DType dtype, int64_t rows,
                        int64_t columns) {
  const Guard guard(*this);
  check(!closed(), ErrorKind::kClosed, "engine: set_weight after close()");
  weights_->set(name, source, dtype, rows, columns, context());
}

void Engine::finish_loading() {
  const Guard guard(*this);
  check(!closed(), ErrorKind::kClosed, "engine: finish_loading after close()");
  weights_->finish();
  ready_ = true;
}

std::unique_ptr<KvCache> Engine::new_cache(int64_t max_length) const {
  check(!closed(), ErrorKind::kClosed, "engine: new_cache after close()");
  return std::make_unique<KvCache>(shape_, max_length);
}

void Engine::close() {
  const Guard guard(*this);
  weights_.reset();
  scratch_.reset();
}

void Engine::validate(const Batch& batch) const {
  check(!closed(), ErrorKind::kClosed, "engine: forward after close()");
  check(ready_, ErrorKind::kInternal, "engine: forward before finish_loading()");
  check(batch.rows > 0 && batch.rows <= max_rows_, ErrorKind::kValue, "engine: ", batch.rows,
        " rows in one pass; 1 to ", max_rows_, " are possible, cut the prompt into chunks");
  int64_t rows = 0;
  for (size_t i = 0; i < batch.caches.size(); ++i) {
    check(batch.counts[i] > 0, ErrorKind::kValue, "engine: sequence ", i, " brings ",
          batch.counts[i], " tokens; at least one is needed");
    check(std::count(batch.caches.begin(), batch.caches.end(), batch.caches[i]) == 1,
          ErrorKind::kValue, "engine: the cache of sequence ", i,
          " is listed twice; each sequence needs its own");
    check(batch.caches[i]->fits(KvCache(shape_, 1)), ErrorKind::kShape,
          "engine: the cache of sequence ", i,
          " belongs to a model of another shape; make it with this engine's new_cache()");
    rows += batch.counts[i];
  }
  check(rows == batch.rows, ErrorKind::kShape, "engine: ", batch.rows,
        " token ids but counts add up to ", rows);
  for (int64_t i = 0; i < batch.rows; ++i) {
    check(batch.token_ids[i] >= 0 && batch.token_ids[i] < shape_.vocab_size, ErrorKind::kValue,
          "engine: token id ", batch.token_ids[i], " at row ", i, "; the vocabulary is 0..",
          shape_.vocab_size - 1);
  }
  check(batch.num_logits <= batch.rows, ErrorKind::kShape, "engine: ", batch.num_logits,
        " rows of logits asked of ", batch.rows, " rows");
  for (int64_t i = 0; i < batch.num_logits; ++i) {
    check(batch.logits_rows[i] >= 0 && batch.logits_rows[i] < batch.rows, ErrorKind::kValue,
          "engine: logits row ", batch.logits_rows[i], " asked of ", batch.rows, " rows");
  }
  const bool forced = batch.routing == Routing::kForced || batch.routing == Routing::kForcedHard;
  check(!forced || batch.mask != nullptr || shape_.num_routed() == 0, ErrorKind::kValue,
        "engine: forced routing needs a mask [rows, routed layers]");
}

void Engine::forward(const Batch& batch) {
  const Guard guard(*this);
  validate(batch);
  for (size_t i = 0; i < batch.caches.size(); ++i)
    batch.caches[i]->reserve(batch.caches[i]->length() + batch.counts[i]);
  stopwatch_.start();
  prepare_rows(batch);
  embed(batch);
  stopwatch_.mark(Part::kOther, false);
  for (int64_t i = 0; i < shape_.num_layers; ++i) {
    const LayerWeights& layer = weights_->layers()[static_cast<size_t>(i)];
    if (layer.routed_index < 0 || batch.routing == Routing::kDense) {
      plain_layer(batch, i, layer);
    } else {
      routed_layer(batch, i, layer);
    }
  }
  finish(batch);
  stopwatch_.mark(Part::kHead, false);
  for (size_t i = 0; i < batch.caches.size(); ++i)
    batch.caches[i]->set_length(batch.caches[i]->length() + batch.counts[i]);
}

// Position and sequence of every row, rotation table, page tables.
void Engine::prepare_rows(const Batch& batch) {
  page_tables_.clear();
  int64_t row = 0;
  for (size_t s = 0; s < batch.caches.size(); ++s) {
    page_tables_.push_back(batch.caches[s]->page_table());
    for (int64_t i = 0; i < batch.counts[s]; ++i, ++row) {
      scratch_->sequences[row] = static_cast<int32_t>(s);
      scratch_->positions[row] = batch.caches[s]->length() + i;
    }
  }
  cpu::rope_table(
      {scratch_->positions, shape_.inv_freq.data(), scratch_->cos_sin, batch.rows, shape_.head_dim},
      context());
}

void Engine::embed(const Batch& batch) {
  cpu::for_rows(context(), batch.rows, shape_.hidden_size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      cpu::unpack_row(weights_->embedding(), batch.token_ids[i],
                      scratch_->h + i * shape_.hidden_size);
  });
}

void Engine::norm(const float* weight, const float* from, int64_t rows) {
  const int64_t d = shape_.hidden_size;
  cpu::rms_norm(
      {{from, d, nullptr, rows}, {scratch_->x, d, nullptr, rows}, weight, d, shape_.rms_norm_eps},
      context());
}

// Rotates the new keys and writes keys and values of every row into the cache.
void Engine::append(const Batch& batch, int64_t layer) {
  const int64_t width = shape_.kv_width(), dim = shape_.head_dim;
  cpu::rope({{scratch_->k, width, nullptr, batch.rows},
             {scratch_->cos_sin, dim, nullptr, batch.rows},
             shape_.num_kv_heads,
             dim},
            context());
  cpu::kv_append({pages_of(batch, layer),
                  {scratch_->k, width, nullptr, batch.rows},
                  {scratch_->v, width, nullptr, batch.rows},
                  scratch_->positions,
                  scratch_->sequences},
                 context());
}

KvPages Engine::pages_of(const Batch& batch, int64_t layer) const {
  const KvCache& first = *batch.caches[0];
  return {first.layout(), page_tables_.data(), first.layer_offset(layer)};
}

// q is compacted: its row i belongs to row index[i] of the batch (to row i when index is null).
void Engine::attend(const Batch& batch, int64_t layer_index, const LayerWeights& layer,
                    int64_t rows, const int32_t* index) {
  const int64_t d = shape_.hidden_size, width = shape_.query_width(), dim = shape_.head_dim;
  cpu::rope({{scratch_->q, width, nullptr, rows},
             {scratch_->cos_sin, dim, index, rows},
             shape_.num_heads,
             dim},
            context());
  cpu::attention({pages_of(batch, layer_index),
                  {scratch_->q, width, nullptr, rows},
                  {scratch_->attention, width, nullptr, rows},
                  shape_.num_heads,
                  scratch_->positions,
                  scratch_->sequences,
                  index,
                  shape_.sliding_window,
                  1.0f / std::sqrt(static_cast<float>(dim)),
                  scratch_->partials},
                 context());
  stopwatch_.mark(Part::kAttention, index != nullptr);
  LinearArgs output;
  output.x = {scratch_->attention, width, nullptr, rows};
  output.outputs[0] = {layer.o, {scratch_->h, d, index, rows}, true, nullptr};
  cpu::linear(output, context());
  stopwatch_.mark(Part::kOutput, index != nullptr);
}

void Engine::plain_layer(const Batch& batch, int64_t index, const LayerWeights& layer) {
  const int64_t d = shape_.hidden_size, rows = batch.rows, kv = shape_.kv_width();
  norm(layer.input_norm, scratch_->h, rows);
  LinearArgs project;
  project.x = {scratch_->x, d, nullptr, rows};
  project.num_outputs = 3;
  project.outputs[0] = {
      layer.q, {scratch_->q, shape_.query_width(), nullptr, rows}, false, nullptr};
  project.outputs[1] = {layer.k, {scratch_->k, kv, nullptr, rows}, false, nullptr};
  project.outputs[2] = {layer.v, {scratch_->v, kv, nullptr, rows}, false, nullptr};
  cpu::linear(project, context());
  append(batch, index);
  stopwatch_.mark(Part::kInputs, false);
  attend(batch, index, layer, rows, nullptr);
  norm(layer.post_attention_norm, scratch_->h, rows);
  cpu::feed_forward({{scratch_->x, d, nullptr, rows},
                     {scratch_->h, d, nullptr, rows},
                     layer.gate,
                     layer.up,
                     layer.down,
                     nullptr,
                     scratch_->activation},
                    context());
  stopwatch_.mark(Part::kFeedForward, false);
}

// Gates, decisions and compacted row lists of the layer; returns how many rows run.
int64_t Engine::route(const Batch& batch, const LayerWeights& layer) {
  const int64_t routed = shape_.num_routed(), j = layer.routed_index, rows = batch.rows;
  const bool caller_gates = batch.gates != nullptr;
  float* gates = caller_gates ? batch.gates + j : scratch_->gates;
  const int64_t stride = caller_gates ? routed : 1;
  cpu::router_gate({{scratch_->encoded, shape_.router_dim, nullptr, rows},
                    shape_.router_dim,
                    layer.router.norm,
                    layer.router.folded,
                    layer.router.dec,
                    layer.router.head,
                    {scratch_->decoded, shape_.hidden_size, nullptr, rows},
                    layer.router.bias,
                    shape_.rms_norm_eps,
                    shape_.router_order,
                    gates,
                    stride},
                   context());
  const float* thresholds =
      batch.thresholds != nullptr ? batch.thresholds : shape_.thresholds.data();
  const bool hard = batch.routing == Routing::kForcedHard || shape_.straight_through;
  int32_t counts[2];
  cpu::compact({gates, stride, batch.routing == Routing::kRouter ? nullptr : batch.mask + j, routed,
                thresholds[j], hard, rows, batch.ran + j, routed, scratch_->run_index,
                scratch_->skip_index, scratch_->run_scale, scratch_->skip_scale, counts});
  return counts[0];
}

void Engine::routed_layer(const Batch& batch, int64_t index, const LayerWeights& layer) {
  const int64_t d = shape_.hidden_size, rows = batch.rows, kv = shape_.kv_width();
  norm(layer.input_norm, scratch_->h, rows);
  LinearArgs project;
  project.x = {scratch_->x, d, nullptr, rows};
  project.num_outputs = 3;
  project.outputs[0] = {
      layer.router.enc, {scratch_->encoded, shape_.router_dim, nullptr, rows}, false, nullptr};
  project.outputs[1] = {layer.k, {scratch_->k, kv, nullptr, rows}, false, nullptr};
  project.outputs[2] = {layer.v, {scratch_->v, kv, nullptr, rows}, false, nullptr};
  cpu::linear(project, context());
  append(batch, index);
  stopwatch_.mark(Part::kInputs, true);
  const int64_t run = route(batch, layer), skip = rows - run;
  stopwatch_.mark(Part::kGate, true);
  const int32_t* run_index = scratch_->run_index;
  if (run > 0) {
    LinearArgs query;
    query.x = {scratch_->x, d, run_index, run};
    query.outputs[0] = {layer.q, {scratch_->q, shape_.query_width(), nullptr, run}, false, nullptr};
    cpu::linear(query, context());
    stopwatch_.mark(Part::kQueries, true);
    attend(batch, index, layer, run, run_index);
  }
  norm(layer.post_attention_norm, scratch_->h, rows);
  if (run > 0) {
    cpu::feed_forward({{scratch_->x, d, run_index, run},
                       {scratch_->h, d, run_index, run},
                       layer.gate,
                       layer.up,
                       layer.down,
                       scratch_->run_scale,
                       scratch_->activation},
                      context());
    stopwatch_.mark(Part::kFeedForward, true);
  }
  if (skip > 0) {
    cpu::adapter({{scratch_->x, d, scratch_->skip_index, skip},
                  {scratch_->h, d, scratch_->skip_index, skip},
                  layer.adapter_gate,
                  layer.adapter_up,
                  layer.adapter_down,
                  scratch_->skip_scale,
                  scratch_->activation},
                 context());
    stopwatch_.mark(Part::kAdapter, true);
  }
}

void Engine::finish(const Batch& batch) {
  if (batch.routing == Routing::kDense) {
    const int64_t total = batch.rows * shape_.num_routed();
    if (batch.gates != nullptr)
      std::fill_n(batch.gates, total, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(batch.ran, total, uint8_t{1});
  }
  if (batch.num_logits == 0) return;
  cpu::lm_head({{scratch_->h, shape_.hidden_size, batch.logits_rows, batch.num_logits},
                weights_->final_norm(),
                shape_.rms_norm_eps,
                weights_->lm_head(),
                scratch_->x,
                batch.logits},
               context());
}

}  // namespace flexidepth
