// The weights of one layer.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct RouterWeights {
  PackedMatrix enc;               // [d_r, d] float32
  const float* norm = nullptr;    // [d_r]
  const float* folded = nullptr;  // [d_r]; null with a strict router
  PackedMatrix dec;               // strict: [d, d_r] float32
  const float* head = nullptr;    // [d]
  float bias = 0.0f;
};

struct LayerWeights {
  const float* input_norm = nullptr;           // [d]
  const float* post_attention_norm = nullptr;  // [d]
  PackedMatrix q, k, v, o;
  PackedMatrix gate, up, down;
  int64_t routed_index = -1;  // place among the routed layers, -1 = always runs
  RouterWeights router;
  PackedMatrix adapter_gate, adapter_up, adapter_down;
};

}  // namespace flexidepth
