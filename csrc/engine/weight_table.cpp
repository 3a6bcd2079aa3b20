#include "engine/weight_table.h"

#include "core/check.h"

namespace flexidepth {

std::string layer_prefix(int64_t index) { return "model.layers." + std::to_string(index) + "."; }

WeightTable::WeightTable(const ModelShape& shape)
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
}

void WeightTable::add_matrix(const std::string& name, PackedMatrix* matrix, int64_t rows,
                             int64_t columns, DType dtype) {
  *matrix = {nullptr, dtype, rows, columns, nullptr};
  slots_[name] = {rows, columns, matrix, nullptr, dtype, false};
}

void WeightTable::add_vector(const std::string& name, const float** vector, int64_t length) {
  slots_[name] = {length, 1, nullptr, vector, DType::kFloat32, false};
}

void WeightTable::add_layer(int64_t index) {
  LayerWeights& layer = layers_[static_cast<size_t>(index)];
  const std::string prefix = layer_prefix(index);
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

void WeightTable::add_routing(const std::string& prefix, LayerWeights& layer) {
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

WeightTable::Slot& WeightTable::claim(const std::string& name, int64_t rows, int64_t columns) {
  const auto found = slots_.find(name);
  check(found != slots_.end(), ErrorKind::kValue, "weights: unexpected tensor ", name,
        "; this configuration has no such weight");
  Slot& s = found->second;
  check(rows == s.rows && columns == s.columns, ErrorKind::kShape, "weights: ", name, " is [", rows,
        ", ", columns, "]; wanted [", s.rows, ", ", s.columns, "]");
  check(!s.filled, ErrorKind::kValue, "weights: ", name, " came twice");
  return s;
}

void WeightTable::check_complete() const {
  std::string missing;
  int64_t count = 0;
  for (const auto& [name, s] : slots_) {
    if (s.filled) continue;
    if (++count <= 5) missing += (missing.empty() ? "" : ", ") + name;
  }
  check(count == 0, ErrorKind::kValue, "weights: ", count, " tensors missing: ", missing,
        count > 5 ? ", ..." : "", "; the checkpoint does not fit its configuration");
}

}  // namespace flexidepth
