#include "engine/cuda_pass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/arena.h"
#include "core/check.h"
#include "ops/adapter.h"
#include "ops/attention.h"
#include "ops/compact.h"
#include "ops/embed.h"
#include "ops/feed_forward.h"
#include "ops/linear.h"
#include "ops/lm_head.h"
#include "ops/project.h"
#include "ops/rope.h"
#include "ops/routed_entry.h"
#include "ops/routed_exit.h"
#include "ops/router.h"
#include "ops/router_code.h"

namespace flexidepth {

struct CudaPass::Scratch {
  float* h = nullptr;                   // [rows, hidden]       residual stream
  float* q = nullptr;                   // [rows, query_width]  running rows only, compacted
  float* attention = nullptr;           // [rows, query_width]  compacted
  float* encoded = nullptr;             // [rows, router_dim]
  float* decoded = nullptr;             // [rows, hidden]       strict router only
  float* activation = nullptr;          // [rows, intermediate] compacted
  float* adapter_activation = nullptr;  // [rows, adapter]      compacted; there while activation is
  float* cos_sin = nullptr;             // [rows, head_dim]
  float* run_scale = nullptr;           // [rows]
  float* skip_scale = nullptr;          // [rows]
  int32_t* run_index = nullptr;         // [rows]
  int32_t* skip_index = nullptr;        // [rows]
  int32_t* counts = nullptr;            // [2]
  float* partials = nullptr;            // attention's pages
  int32_t* counters = nullptr;          // attention's, 0 between passes
  uint32_t* barrier = nullptr;          // the persistent kernel's
  size_t bytes = 0;
};

CudaPass::CudaPass(const ModelShape& shape, const float* inv_freq)
    : shape_(shape), inv_freq_(inv_freq), weights_(shape) {}

CudaPass::Scratch CudaPass::lay_out(void* base, int64_t rows, int64_t max_pages,
                                    bool prompt) const {
  const ModelShape& s = shape_;
  Scratch made;
  const auto take = [&](auto*& piece, size_t count) {
    if (base != nullptr)
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(
          static_cast<uint8_t*>(base) + made.bytes);
    made.bytes += align_up(count * sizeof(*piece));
  };
  const auto per_row = [&](int64_t count) { return static_cast<size_t>(rows * count); };
  take(made.h, per_row(s.hidden_size));
  take(made.q, per_row(s.query_width()));
  take(made.attention, per_row(s.query_width()));
  take(made.encoded, per_row(s.router_dim));
  take(made.decoded, per_row(s.strict_router ? s.hidden_size : 0));
  take(made.activation, per_row(s.intermediate_size));
  take(made.adapter_activation, per_row(s.adapter_dim));
  take(made.cos_sin, per_row(s.head_dim));
  take(made.run_scale, per_row(1));
  take(made.skip_scale, per_row(1));
  take(made.run_index, per_row(1));
  take(made.skip_index, per_row(1));
  take(made.counts, 2);
  if (!prompt || size_of(s.dtype) != 2) {
    take(made.counters, cuda::attention_counters(rows, s.num_heads));
    take(made.barrier, 1);
    take(made.partials, cuda::attention_scratch_floats(rows, s.num_heads, s.head_dim, max_pages));
  }
  return made;
}

size_t CudaPass::scratch_bytes(int64_t rows, int64_t max_pages, bool prompt) const {
  return lay_out(nullptr, rows, max_pages, prompt).bytes;
}

size_t CudaPass::page_bytes() const {
  return static_cast<size_t>(shape_.num_layers) * cuda::kv_layer_bytes(cache_layout());
}

// One pass: its ops in their order.
class CudaPass::Run {
 public:
  Run(const CudaPass& pass, const CudaBatch& batch, const cuda::Context& context)
      : pass_(pass),
        s_(pass.shape_),
        batch_(batch),
        context_(context),
        to_(pass.lay_out(batch.scratch, batch.scratch_rows, batch.scratch_pages, batch.prompt)) {}

  void begin() {
    cuda::embed({batch_.token_ids, pass_.weights_.embedding(), rows_of(to_.h, s_.hidden_size)},
                context_);
    cuda::rope_table({batch_.positions, pass_.inv_freq_, to_.cos_sin, batch_.rows, s_.head_dim},
                     context_);
  }

  void plain_layer(int64_t index, const LayerWeights& layer) {
    ProjectArgs project = projection(index, layer);
    project.first = layer.q;
    project.first_out = rows_of(to_.q, s_.query_width());
    project.rotate_first = true;
    project.k = layer.k;
    project.v = layer.v;
    cuda::project(project, context_);
    attend(index, layer, all_rows());
    cuda::feed_forward(feed_forward(layer, all_rows()), context_);
  }

  void routed_layer(int64_t index, const LayerWeights& layer) {
    if (batch_.rows <= kMaxRouteRows && !s_.strict_router) return few_routed_rows(index, layer);
    ProjectArgs project = projection(index, layer);
    project.first = layer.router.enc;
    project.first_out = rows_of(to_.encoded, s_.router_dim);
    project.k = layer.k;
    project.v = layer.v;
    cuda::project(project, context_);
    cuda::router_gate(gate(layer), context_);
    cuda::compact(decisions(layer), context_);
    ProjectArgs queries = projection(index, layer);
    queries.first = layer.q;
    queries.first_out = rows_of(to_.q, s_.query_width());
    queries.rotate_first = true;
    queries.h = listed(to_.h, s_.hidden_size, running());
    queries.cos_sin = listed(to_.cos_sin, s_.head_dim, running());
    cuda::project(queries, context_);
    attend(index, layer, running());
    cuda::feed_forward(feed_forward(layer, running()), context_);
    cuda::adapter(adapter(layer, skipped()), context_);
  }

  void few_routed_rows(int64_t index, const LayerWeights& layer) {
    cuda::router_code(code(layer), context_);
    ProjectArgs project = projection(index, layer);
    project.first = layer.q;
    project.first_out = rows_of(to_.q, s_.query_width());
    project.rotate_first = true;
    project.k = layer.k;
    project.v = layer.v;
    const GatedMlpArgs run = feed_forward(layer, running()), skip = adapter(layer, skipped());
    cuda::routed_entry({project, gate(layer), decisions(layer), skip}, context_);
    attend(index, layer, running());
    cuda::gated_activation("feed_forward", run, context_);
    cuda::routed_exit({run, skip}, context_);
  }

  void finish() {
    if (batch_.num_logits == 0) return;
    cuda::lm_head({{to_.h, s_.hidden_size, batch_.logits_rows, batch_.num_logits},
                   pass_.weights_.final_norm(),
                   s_.rms_norm_eps,
                   pass_.weights_.lm_head(),
                   nullptr,
                   batch_.logits},
                  context_);
  }

 private:
  // Rows that an op takes: how many, which and how much they weigh is known to the device.
  struct Listed {
    const int32_t* index = nullptr;
    const int32_t* live = nullptr;
    const float* scale = nullptr;
  };

  static Listed all_rows() { return {}; }
  Listed running() const { return {to_.run_index, to_.counts, to_.run_scale}; }
  Listed skipped() const { return {to_.skip_index, to_.counts + 1, to_.skip_scale}; }
  MutableRows rows_of(float* base, int64_t width) const {
    return {base, width, nullptr, batch_.rows, nullptr};
  }
  // Compacted: row i is the i-th of the listed ones.
  MutableRows compacted(float* base, int64_t width, const Listed& rows) const {
    return {base, width, nullptr, batch_.rows, rows.live};
  }
  template <class Float>
  RowView<Float> view(Float* base, int64_t width, const Listed& rows) const {
    return {base, width, rows.index, batch_.rows, rows.live};
  }
  Rows listed(const float* base, int64_t width, const Listed& rows) const {
    return view(base, width, rows);
  }
  static Rows read(const MutableRows& rows) {
    return {rows.base, rows.stride, rows.index, rows.count, rows.live};
  }

  KvPages pages(int64_t index) const {
    const KvLayout layout = pass_.cache_layout();
    return {layout, batch_.tables, static_cast<size_t>(index) * cuda::kv_layer_bytes(layout)};
  }

  ProjectArgs projection(int64_t index, const LayerWeights& layer) const {
    ProjectArgs args{};
    args.h = read(rows_of(to_.h, s_.hidden_size));
    args.norm = layer.input_norm;
    args.eps = s_.rms_norm_eps;
    args.head_dim = s_.head_dim;
    args.cos_sin = read(rows_of(to_.cos_sin, s_.head_dim));
    args.pages = pages(index);
    args.positions = batch_.positions;
    args.sequences = batch_.sequences;
    return args;
  }

  // The first phase, and the weights that are brought closer meanwhile: keys' and values', and half
  // of the prefetched bytes each for either way that the layer can go.
  RouterCodeArgs code(const LayerWeights& layer) const {
    const auto most = [](const PackedMatrix& w, int64_t bytes) {
      return Ahead{w.data, std::min(bytes, w.n * w.k * static_cast<int64_t>(size_of(w.dtype)))};
    };
    const int64_t all = std::numeric_limits<int64_t>::max(), some = batch_.prefetch_bytes;
    return {read(rows_of(to_.h, s_.hidden_size)),
            layer.input_norm,
            s_.rms_norm_eps,
            layer.router.enc,
            rows_of(to_.encoded, s_.router_dim),
            {most(layer.k, all), most(layer.v, all), most(layer.q, some / 2),
             most(layer.adapter_gate, some / 4), most(layer.adapter_up, some / 4)}};
  }

  RouterGateArgs gate(const LayerWeights& layer) const {
    return {rows_of(to_.encoded, s_.router_dim),
            s_.router_dim,
            layer.router.norm,
            layer.router.folded,
            layer.router.dec,
            layer.router.head,
            rows_of(to_.decoded, s_.hidden_size),
            layer.router.bias,
            s_.rms_norm_eps,
            s_.router_order,
            batch_.gates + layer.routed_index,
            s_.num_routed()};
  }

  CompactArgs decisions(const LayerWeights& layer) const {
    const int64_t routed = s_.num_routed(), j = layer.routed_index;
    CompactArgs args{};
    args.gates = batch_.gates + j;
    args.gate_stride = routed;
    args.forced = batch_.routing == Routing::kRouter ? nullptr : batch_.mask + j;
    args.forced_stride = routed;
    args.threshold_at = batch_.thresholds + j;
    args.unit_scales = batch_.routing == Routing::kForcedHard || s_.straight_through;
    args.rows = batch_.rows;
    args.ran = batch_.ran + j;
    args.ran_stride = routed;
    args.run_index = to_.run_index;
    args.skip_index = to_.skip_index;
    args.run_scale = to_.run_scale;
    args.skip_scale = to_.skip_scale;
    args.counts = to_.counts;
    return args;
  }

  void attend(int64_t index, const LayerWeights& layer, const Listed& rows) {
    const int64_t width = s_.query_width();
    cuda::attention(
        {pages(index), read(compacted(to_.q, width, rows)), compacted(to_.attention, width, rows),
         s_.num_heads, batch_.positions, batch_.sequences, rows.index, s_.sliding_window,
         1.0f / std::sqrt(static_cast<float>(s_.head_dim)), to_.partials, batch_.max_pages,
         to_.counters, batch_.prompt},
        context_);
    LinearArgs output;
    output.x = read(compacted(to_.attention, width, rows));
    output.outputs[0] = {layer.o, view(to_.h, s_.hidden_size, rows), true, nullptr};
    cuda::linear(output, context_);
  }

  GatedMlpArgs feed_forward(const LayerWeights& layer, const Listed& rows) const {
    return mlp(layer, {layer.gate, layer.up, layer.down}, to_.activation, rows);
  }
  GatedMlpArgs adapter(const LayerWeights& layer, const Listed& rows) const {
    return mlp(layer, {layer.adapter_gate, layer.adapter_up, layer.adapter_down},
               to_.adapter_activation, rows);
  }

  struct MlpWeights {
    const PackedMatrix &gate, &up, &down;
  };

  GatedMlpArgs mlp(const LayerWeights& layer, const MlpWeights& weights, float* activation,
                   const Listed& rows) const {
    return {listed(to_.h, s_.hidden_size, rows),
            view(to_.h, s_.hidden_size, rows),
            weights.gate,
            weights.up,
            weights.down,
            rows.scale,
            activation,
            layer.post_attention_norm,
            s_.rms_norm_eps};
  }

  const CudaPass& pass_;
  const ModelShape& s_;
  const CudaBatch& batch_;
  const cuda::Context& context_;
  const Scratch to_;
};

size_t CudaPass::layer_table_bytes() const {
  return weights_.layers().size() * sizeof(LayerWeights);
}

void CudaPass::write_layer_table(void* to) const {
  static_assert(std::is_trivially_copyable_v<LayerWeights>);
  std::memcpy(to, weights_.layers().data(), layer_table_bytes());
}

void CudaPass::set_layer_table(const void* on_device) {
  layer_table_ = static_cast<const LayerWeights*>(on_device);
}

PersistentArgs CudaPass::persistent(const CudaBatch& batch) const {
  const ModelShape& s = shape_;
  check(!batch.prompt && !s.strict_router, ErrorKind::kUnsupported, "engine: a persistent pass of ",
        batch.prompt ? "a prompt; it takes one row a sequence"
                     : "a strict router; it takes a folded one");
  check(layer_table_ != nullptr, ErrorKind::kInternal, "engine: no table of layers on the device");
  const Scratch to = lay_out(batch.scratch, batch.scratch_rows, batch.scratch_pages, false);
  const bool forced = batch.routing != Routing::kRouter;
  return {layer_table_,
          s.num_layers,
          s.num_routed(),
          weights_.embedding(),
          weights_.final_norm(),
          weights_.lm_head(),
          s.num_heads,
          s.intermediate_size,
          s.router_dim,
          s.adapter_dim,
          s.sliding_window,
          s.rms_norm_eps,
          1.0f / std::sqrt(static_cast<float>(s.head_dim)),
          s.router_order,
          {cache_layout(), batch.tables, 0},
          inv_freq_,
          batch.rows,
          batch.token_ids,
          batch.positions,
          batch.sequences,
          batch.max_pages,
          batch.routing == Routing::kDense,
          batch.routing == Routing::kForcedHard || s.straight_through,
          forced ? batch.mask : nullptr,
          batch.thresholds,
          batch.logits_rows,
          batch.num_logits,
          batch.logits,
          batch.gates,
          batch.ran,
          to.h,
          to.q,
          to.attention,
          to.encoded,
          to.activation,
          to.cos_sin,
          to.partials,
          to.counters,
          to.barrier};
}

void CudaPass::run(const CudaBatch& batch, const cuda::Context& context) const {
  check(batch.rows <= batch.scratch_rows && batch.max_pages <= batch.scratch_pages,
        ErrorKind::kInternal, "engine: ", batch.rows, " rows and ", batch.max_pages,
        " pages with scratch for ", batch.scratch_rows, " and ", batch.scratch_pages);
  if (batch.persistent) return cuda::persistent_pass(persistent(batch), context);
  Run run(*this, batch, context);
  run.begin();
  for (int64_t i = 0; i < shape_.num_layers; ++i) {
    const LayerWeights& layer = weights_.layers()[static_cast<size_t>(i)];
    if (layer.routed_index < 0 || batch.routing == Routing::kDense) {
      run.plain_layer(i, layer);
    } else {
      run.routed_layer(i, layer);
    }
  }
  run.finish();
}

}  // namespace flexidepth
