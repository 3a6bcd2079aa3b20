// Logits of chosen rows: logits[i] = W_head Norm(h[i]), float32 out; and the first of the largest,
// in the same phase.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct LmHeadArgs {
  Rows h;             // [rows, d] residual stream after the last layer
  const float* norm;  // [d] final RMSNorm
  float eps;
  PackedMatrix weight;  // [vocab, d]
  float* normed;        // scratch [rows, d], CPU
  float* logits;        // [rows, vocab]
  // CUDA: [rows] keys of the largest logits, see best_token(); null = not wanted.
  uint64_t* best = nullptr;
};

// Keys grow with the logit and, among equal ones, fall with the token: the largest key is the first
// of the largest logits. NaN lies above everything.
constexpr int32_t best_token(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

namespace cpu {
void lm_head(const LmHeadArgs& args, const Context& context);
}
namespace cuda {
void lm_head(const LmHeadArgs& args, const Context& context);
}

}  // namespace flexidepth
