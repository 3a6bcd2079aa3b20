// The router's gate of a layer, per token, float32 throughout:
//   e = W_enc x  [d_r]                          (ops/router_code.h, or with K and V ops/project.h)
//   z = tanh(Norm(e))  or  Norm(tanh(e))        by RouterOrder
//   w = sigmoid(W_head (W_dec z) + b)
// Folded: v = W_dec^T W_head is one vector and w = sigmoid(v . z + b). Strict: both products as
// written.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

enum class RouterOrder : int { kNormTanh = 0, kTanhNorm = 1 };

struct RouterGateArgs {
  MutableRows encoded;  // [rows, d_r]: e on entry, z on return (CUDA, folded: left as it is)
  int64_t router_dim;   // d_r
  const float* norm;    // [d_r]
  const float* folded;  // [d_r] v; null selects the strict way
  PackedMatrix dec;     // strict: [d, d_r]
  const float* head;    // strict: [d]
  MutableRows decoded;  // strict: scratch [rows, d]
  float bias;
  float eps;
  RouterOrder order;
  float* gates;  // [rows], gate_stride floats apart
  int64_t gate_stride;
};

namespace cpu {
void router_gate(const RouterGateArgs& args, const Context& context);
// v[j] = sum_i head[i] dec[i, j] in float64, rounded once. dec row-major [d, d_r].
void fold_router(const float* dec, const float* head, int64_t hidden, int64_t router_dim,
                 float* folded);
}  // namespace cpu
namespace cuda {
void router_gate(const RouterGateArgs& args, const Context& context);
}  // namespace cuda

}  // namespace flexidepth
