// Rotary position embedding, half-split as in Llama: with a = x[i], b = x[i + head_dim / 2] of a
// head,
//   a' = a cos - b sin,  b' = b cos + a sin,  angle = position * inv_freq[i].
// Scaled variants (llama3, linear) differ in inv_freq alone, which the caller computes.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct RopeTableArgs {
  const int64_t* positions;  // [rows]
  const float* inv_freq;     // [head_dim / 2]
  float* cos_sin;            // [rows, head_dim]: cosines, then sines
  int64_t rows;
  int64_t head_dim;
};

struct RopeArgs {
  MutableRows x;  // [rows, num_heads * head_dim], rotated in place
  Rows cos_sin;   // [rows, head_dim] from rope_table
  int64_t num_heads;
  int64_t head_dim;
};

namespace cpu {
void rope_table(const RopeTableArgs& args, const Context& context);
void rope(const RopeArgs& args, const Context& context);
}  // namespace cpu
namespace cuda {
void rope_table(const RopeTableArgs& args, const Context& context);
void rope(const RopeArgs& args, const Context& context);
}  // namespace cuda

}  // namespace flexidepth
