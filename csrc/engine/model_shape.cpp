#include "engine/model_shape.h"

#include "core/check.h"
#include "ops/attention.h"

namespace flexidepth {

void ModelShape::validate() const {
  const auto positive = [](int64_t value, const char* name) {
    check(value > 0, ErrorKind::kValue, "engine: ", name, " is ", value, "; it must be positive");
  };
  positive(vocab_size, "vocab_size");
  positive(hidden_size, "hidden_size");
  positive(intermediate_size, "intermediate_size");
  positive(num_layers, "num_hidden_layers");
  positive(num_heads, "num_attention_heads");
  positive(num_kv_heads, "num_key_value_heads");
  check(num_heads % num_kv_heads == 0, ErrorKind::kValue, "engine: ", num_heads,
        " attention heads over ", num_kv_heads,
        " KV heads; the first must be a multiple of the second");
  check(head_dim > 0 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim, ErrorKind::kUnsupported,
        "engine: head_dim is ", head_dim, "; even sizes up to ", kMaxHeadDim, " are supported");
  check(static_cast<int64_t>(inv_freq.size()) == head_dim / 2, ErrorKind::kShape,
        "engine: ", inv_freq.size(), " rope frequencies for head_dim ", head_dim, "; ",
        head_dim / 2, " are needed");
  check(thresholds.size() == routing_layers.size(), ErrorKind::kShape,
        "engine: ", thresholds.size(), " thresholds for ", routing_layers.size(), " routed layers");
  int64_t last = -1;
  for (const int64_t layer : routing_layers) {
    check(layer > last && layer < num_layers, ErrorKind::kValue, "engine: routed layer ", layer,
          " is out of order or outside 0..", num_layers - 1);
    last = layer;
  }
  if (!routing_layers.empty()) {
    positive(router_dim, "router_dim");
    positive(adapter_dim, "adapter_dim");
  }
}

}  // namespace flexidepth
