// The router's code of every row of a routed layer, float32:
//   e = W_enc RMSNorm(h)
// Up to 8 rows, CUDA alone: the first phase of a layer whose gate is found in the next one
// (ops/routed_entry.h). Its matrix is small, so other blocks of the launch meanwhile ask for
// weights that later phases read: these come from memory into the L2 cache. What both ways through
// the layer need (W_k, W_v) costs nothing so; what only one of them needs costs bandwidth when the
// layer goes the other way.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

// Bytes that a later phase will read, or may.
struct Ahead {
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
};

constexpr int kMaxAhead = 5;

struct RouterCodeArgs {
  Rows h;             // [rows, d]
  const float* norm;  // [d]
  float eps;
  PackedMatrix enc;     // [d_r, d] float32
  MutableRows encoded;  // [rows, d_r]
  Ahead ahead[kMaxAhead];
};

namespace cuda {
void router_code(const RouterCodeArgs& args, const Context& context);
}

}  // namespace flexidepth
