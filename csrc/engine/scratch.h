// Buffers of a forward pass for up to max_rows tokens, sized once.
#pragma once

#include "core/arena.h"
#include "engine/model_shape.h"

namespace flexidepth {

struct Scratch {
  Scratch(const ModelShape& shape, int64_t max_rows);

  Arena arena;
  float* h;            // [rows, hidden]         residual stream
  float* x;            // [rows, hidden]         normed input of the layer, then of its feed-forward
  float* q;            // [rows, query_width]    running rows only, compacted
  float* k;            // [rows, kv_width]
  float* v;            // [rows, kv_width]
  float* attention;    // [rows, query_width]    compacted
  float* encoded;      // [rows, router_dim]
  float* decoded;      // [rows, hidden]         strict router only
  float* activation;   // [rows, max(intermediate, adapter)]
  float* cos_sin;      // [rows, head_dim]
  float* partials;     // attention's page partials
  float* gates;        // [rows]                 of the current layer, when the caller wants none
  float* run_scale;    // [rows]
  float* skip_scale;   // [rows]
  int32_t* run_index;  // [rows]
  int32_t* skip_index;  // [rows]
  int32_t* sequences;   // [rows]
  int64_t* positions;   // [rows]

  // Fills every float with NaN, for tests: no result may depend on what a buffer held before.
  void poison();

 private:
  size_t float_bytes_ = 0;
};

}  // namespace flexidepth
