// Sizes and switches of a model, as FlexiDepthConfig states them.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "ops/router.h"

namespace flexidepth {

struct ModelShape {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t sliding_window = 0;  // 0 = none
  int64_t router_dim = 0;
  int64_t adapter_dim = 0;
  float rms_norm_eps = 1e-5f;
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;  // o_proj
  bool mlp_bias = false;
  bool router_bias = false;
  bool straight_through = false;  // gate: unscaled outputs
  bool strict_router = false;     // keep W_dec and W_head apart
  RouterOrder router_order = RouterOrder::kNormTanh;
  DType dtype = DType::kBFloat16;  // of weights and cache; norms, biases and routers stay float32
  std::vector<int64_t> routing_layers;  // ascending
  std::vector<float> thresholds;        // one per routed layer
  std::vector<float> inv_freq;          // [head_dim / 2], rope scaling applied

  int64_t query_width() const { return num_heads * head_dim; }
  int64_t kv_width() const { return num_kv_heads * head_dim; }
  int64_t num_routed() const { return static_cast<int64_t>(routing_layers.size()); }

  // Throws Error with the offending values.
  void validate() const;
};

}  // namespace flexidepth
