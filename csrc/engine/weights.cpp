#include "engine/weights.h"

#include <cmath>

#include "core/check.h"
#include "ops/pack.h"

namespace flexidepth {

namespace {

float element(const void* source, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source)[i];
  const uint16_t bits = static_cast<const uint16_t*>(source)[i];
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : half_to_float(bits);
}

[[noreturn]] void fail_not_finite(const std::string& name, int64_t bad, int64_t total) {
  fail(ErrorKind::kValue, "weights: ", bad, " of ", total, " values of ", name,
       " are NaN or infinite; the checkpoint is damaged, load another copy");
}

}  // namespace

Weights::Weights(const ModelShape& shape)
    : shape_(shape), layers_(static_cast<size_t>(shape.num_layers)) {
  shape_.validate();
  add_matrix("model.embed_tokens.weight", &embedding_, shape_.vocab_size, shape_.hidden_size,
             shape_.dtype);
  if (!shape_.tied_embeddings)
    add_matrix("lm_head.weight", &lm_head_, shape_.vocab_size, shape_.hidden_size, shape_.dtype);
  add_vector("model.norm.weight", &final_norm_, shape_.hidden_size);
  router_biases_.resize(shape_.routing_layers.size(), nullptr);
  for (size_t i = 0; i < shape_.routing_layers.size(); ++i)
    layers_[static_cast<size_t>(shape_.routing_layers[i])].routed_index = static_cast<int64_t>(i);
  for (int64_t i = 0; i < shape_.num_layers; ++i) add_layer(i);
  place();
}

void Weights::add_matrix(const std::string& name, PackedMatrix* matrix, int64_t rows,
                         int64_t columns, DType dtype) {
  *matrix = {nullptr, dtype, rows, columns, nullptr};
  slots_[name] = {rows, columns, matrix, nullptr, dtype, false};
}

void Weights::add_vector(const std::string& name, const float** vector, int64_t length) {
  slots_[name] = {length, 1, nullptr, vector, DType::kFloat32, false};
}

void Weights::add_layer(int64_t index) {
  LayerWeights& layer = layers_[static_cast<size_t>(index)];
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const int64_t d = shape_.hidden_size, f = shape_.intermediate_size;
  add_vector(prefix + "input_layernorm.weight", &layer.input_norm, d);
  add_vector(prefix + "post_attention_layernorm.weight", &layer.post_attention_norm, d);
  const auto projection = [&](const char* name, PackedMatrix* matrix, int64_t rows, int64_t columns,
                              bool bias) {
    add_matrix(prefix + name + ".weight", matrix, rows, columns, shape_.dtype);
    if (bias) add_vector(prefix + name + ".bias", &matrix->bias, rows);
  };
  projection("self_attn.q_proj", &layer.q, shape_.query_width(), d, shape_.qkv_bias);
  projection("self_attn.k_proj", &layer.k, shape_.kv_width(), d, shape_.qkv_bias);
  projection("self_attn.v_proj", &layer.v, shape_.kv_width(), d, shape_.qkv_bias);
  projection("self_attn.o_proj", &layer.o, d, shape_.query_width(), shape_.output_bias);
  projection("mlp.gate_proj", &layer.gate, f, d, shape_.mlp_bias);
  projection("mlp.up_proj", &layer.up, f, d, shape_.mlp_bias);
  projection("mlp.down_proj", &layer.down, d, f, shape_.mlp_bias);
  if (layer.routed_index >= 0) add_routing(prefix, layer);
}

void Weights::add_routing(const std::string& prefix, LayerWeights& layer) {
  const int64_t d = shape_.hidden_size, r = shape_.router_dim, a = shape_.adapter_dim;
  const auto routed = static_cast<size_t>(layer.routed_index);
  add_matrix(prefix + "router.enc.weight", &layer.router.enc, r, d, DType::kFloat32);
  add_vector(prefix + "router.norm.weight", &layer.router.norm, r);
  add_matrix(prefix + "router.dec.weight", &layer.router.dec, d, r, DType::kFloat32);
  add_vector(prefix + "router.head.weight", &layer.router.head, d);
  if (shape_.router_bias) add_vector(prefix + "router.head.bias", &router_biases_[routed], 1);
  add_matrix(prefix + "adapter.gate_proj.weight", &layer.adapter_gate, a, d, shape_.dtype);
  add_matrix(prefix + "adapter.up_proj.weight", &layer.adapter_up, a, d, shape_.dtype);
  add_matrix(prefix + "adapter.down_proj.weight", &layer.adapter_down, d, a, shape_.dtype);
}

// Gives every slot its piece of one arena.
void Weights::place() {
  size_t total = 0;
  const auto size = [](const Slot& s) {
    return align_up(s.matrix != nullptr ? cpu::packed_bytes(s.dtype, s.rows, s.columns)
                                        : static_cast<size_t>(s.rows) * sizeof(float));
  };
  for (const auto& [name, s] : slots_) total += size(s);
  total += shape_.routing_layers.size() *
           align_up(static_cast<size_t>(shape_.router_dim) * sizeof(float));
  arena_ = std::make_unique<Arena>(total);
  for (auto& [name, s] : slots_) {
    uint8_t* piece = arena_->take(size(s));
    if (s.matrix != nullptr) {
      s.matrix->data = piece;
    } else {
      *s.vector = reinterpret_cast<const float*>(piece);
    }
  }
}

void Weights::set(const std::string& name, const void* source, DType dtype, int64_t rows,
                  int64_t columns, const cpu::Context& context) {
  const auto found = slots_.find(name);
  check(found != slots_.end(), ErrorKind::kValue, "weights: unexpected tensor ", name,
        "; this configuration has no such weight");
  Slot& s = found->second;
  check(rows == s.rows && columns == s.columns, ErrorKind::kShape, "weights: ", name, " is [", rows,
        ", ", columns, "]; wanted [", s.rows, ", ", s.columns, "]");
  check(!s.filled, ErrorKind::kValue, "weights: ", name, " came twice");
  int64_t bad = 0;
  if (s.matrix != nullptr) {
    bad = cpu::pack({source, dtype, rows, columns, const_cast<uint8_t*>(s.matrix->data), s.dtype},
                    context);
  } else {
    auto* out = const_cast<float*>(*s.vector);
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = element(source, dtype, i);
      bad += std::isfinite(out[i]) ? 0 : 1;
    }
  }
  if (bad > 0) fail_not_finite(name, bad, rows * columns);
  s.filled = true;
}

void Weights::finish() {
  std::string missing;
  int64_t count = 0;
  for (const auto& [name, s] : slots_) {
    if (s.filled) continue;
    if (++count <= 5) missing += (missing.empty() ? "" : ", ") + name;
  }
  check(count == 0, ErrorKind::kValue, "weights: ", count, " tensors missing: ", missing,
        count > 5 ? ", ..." : "", "; the checkpoint does not fit its configuration");
  std::vector<float> dec(static_cast<size_t>(shape_.hidden_size * shape_.router_dim));
  for (LayerWeights& layer : layers_) {
    if (layer.routed_index < 0) continue;
    const float* bias = router_biases_[static_cast<size_t>(layer.routed_index)];
    if (bias != nullptr) layer.router.bias = *bias;
    if (shape_.strict_router) continue;
    for (int64_t i = 0; i < shape_.hidden_size; ++i)
      cpu::unpack_row(layer.router.dec, i, dec.data() + i * shape_.router_dim);
    auto* folded = reinterpret_cast<float*>(
        arena_->take(static_cast<size_t>(shape_.router_dim) * sizeof(float)));
    cpu::fold_router(dec.data(), layer.router.head, shape_.hidden_size, shape_.router_dim, folded);
    layer.router.folded = folded;
  }
}

}  // namespace flexidepth
