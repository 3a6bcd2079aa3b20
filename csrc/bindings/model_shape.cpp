#include "bindings/model_shape.h"

#include <pybind11/stl.h>

namespace flexidepth::bindings {

namespace py = pybind11;

ModelShape shape_from(const py::dict& d) {
  const auto integer = [&](const char* key) { return d[key].cast<int64_t>(); };
  const auto flag = [&](const char* key) { return d[key].cast<bool>(); };
  ModelShape s;
  s.vocab_size = integer("vocab_size");
  s.hidden_size = integer("hidden_size");
  s.intermediate_size = integer("intermediate_size");
  s.num_layers = integer("num_layers");
  s.num_heads = integer("num_heads");
  s.num_kv_heads = integer("num_kv_heads");
  s.head_dim = integer("head_dim");
  s.sliding_window = integer("sliding_window");
  s.router_dim = integer("router_dim");
  s.adapter_dim = integer("adapter_dim");
  s.rms_norm_eps = d["rms_norm_eps"].cast<float>();
  s.tied_embeddings = flag("tied_embeddings");
  s.qkv_bias = flag("qkv_bias");
  s.output_bias = flag("output_bias");
  s.mlp_bias = flag("mlp_bias");
  s.router_bias = flag("router_bias");
  s.straight_through = flag("straight_through");
  s.strict_router = flag("strict_router");
  s.router_order = static_cast<RouterOrder>(d["router_order"].cast<int>());
  s.dtype = static_cast<DType>(d["dtype"].cast<int>());
  s.routing_layers = d["routing_layers"].cast<std::vector<int64_t>>();
  s.thresholds = d["thresholds"].cast<std::vector<float>>();
  s.inv_freq = d["inv_freq"].cast<std::vector<float>>();
  return s;
}

}  // namespace flexidepth::bindings
