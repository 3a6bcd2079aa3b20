// What attention and the router take from the residual stream, in one phase:
//   x = RMSNorm(h),  first = W_first x,  k = W_k x,  v = W_v x   (biases added where there are any)
// k, and first where it holds queries, are rotated; k and v go into the cache.
// A plain layer has first = queries, a routed one first = the router's code e of every row. Then
// its queries are projected by a second call without keys and values, for the running rows alone.
// Up to 8 rows, ops/router_code.h and ops/routed_entry.h take the place of both calls.
#pragma once

#include "ops/kv_cache.h"

namespace flexidepth {

struct ProjectArgs {
  Rows h;             // [rows, d]
  const float* norm;  // [d]
  float eps;
  PackedMatrix first;     // [n, d]; n = 0: none
  MutableRows first_out;  // [rows, n]
  bool rotate_first;
  PackedMatrix k;  // [num_kv_heads * head_dim, d]; n = 0: neither keys nor values
  PackedMatrix v;
  int64_t head_dim;
  Rows cos_sin;              // [rows, head_dim] from rope_table, listed as h is
  KvPages pages;             // of the keys and values
  const int64_t* positions;  // [rows], not listed: keys and values are of every row
  const int32_t* sequences;  // [rows]
};

namespace cuda {
void project(const ProjectArgs& args, const Context& context);
}

}  // namespace flexidepth
