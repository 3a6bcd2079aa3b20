// SwiGLU with a weighted residual: h[i] += scale[i] * W_down( silu(W_gate y[i]) * W_up y[i] ),
// with y = RMSNorm(h) (CUDA) or as given.
// The feed-forward of running tokens and the adapter of skipped tokens are this same map with their
// own weights and scales (w and 1 - w).
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct GatedMlpArgs {
  Rows y;                        // [rows, d] normed input
  MutableRows h;                 // [rows, d] residual stream, added to
  PackedMatrix gate;             // [width, d]
  PackedMatrix up;               // [width, d]
  PackedMatrix down;             // [d, width]
  const float* scale = nullptr;  // [rows]; null = 1
  float* activation;             // scratch [rows, width]
  // CUDA: y is not normed yet, and this is the norm's weight [d]; null = it is.
  const float* norm = nullptr;
  float eps = 0;
};

namespace cpu {
void gated_mlp(const GatedMlpArgs& args, const Context& context);
}
namespace cuda {
// The first half: activation[i] = silu(W_gate y[i]) * W_up y[i].
void gated_activation(const char* op, const GatedMlpArgs& args, const Context& context);
void gated_mlp(const char* op, const GatedMlpArgs& args, const Context& context);
}  // namespace cuda

}  // namespace flexidepth
