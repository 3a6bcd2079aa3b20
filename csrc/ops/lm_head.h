// Logits of chosen rows: logits[i] = W_head Norm(h[i]), float32 out.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct LmHeadArgs {
  Rows h;             // [rows, d] residual stream after the last layer
  const float* norm;  // [d] final RMSNorm
  float eps;
  PackedMatrix weight;  // [vocab, d]
  float* normed;        // scratch [rows, d]
  float* logits;        // [rows, vocab]
};

namespace cpu {
void lm_head(const LmHeadArgs& args, const Context& context);
}

}  // namespace flexidepth
