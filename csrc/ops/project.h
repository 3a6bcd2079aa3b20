// What attention and the router take from the residual stream, in one phase:
//   x = RMSNorm(h),  first = W_first x,  k = W_k x,  v = W_v x   (biases added where there are any)
// k, and first where it holds queries, are rotated; k and v go into the cache.
// A plain layer has first = queries, a routed one first = the router's code e of every row. Then
// its queries are projected by a second call without keys and values, for the running rows alone.
// That call can decide itself which rows run (`route`): every block computes the gates of all its
// rows from e, which costs no phase of its own, and one block writes the decisions down for the ops
// behind.
#pragma once

#include "ops/compact.h"
#include "ops/kv_cache.h"
#include "ops/router.h"

namespace flexidepth {

struct RouteArgs {
  RouterGateArgs gate;  // folded; encoded is left as it is
  CompactArgs compact;
};

constexpr int64_t kMaxRouteRows = 8;

struct ProjectArgs {
  Rows h;             // [rows, d]; with route: all rows, of which those that run are projected
  const float* norm;  // [d]
  float eps;
  PackedMatrix first;     // [n, d]; n = 0: none
  MutableRows first_out;  // [rows, n]; with route: row i is the i-th that runs
  bool rotate_first;
  PackedMatrix k;  // [num_kv_heads * head_dim, d]; n = 0: neither keys nor values
  PackedMatrix v;
  int64_t head_dim;
  Rows cos_sin;              // [rows, head_dim] from rope_table, listed as h is
  KvPages pages;             // of the keys and values
  const int64_t* positions;  // [rows], not listed: keys and values are of every row
  const int32_t* sequences;  // [rows]
  const RouteArgs* route = nullptr;
};

namespace cuda {
void project(const ProjectArgs& args, const Context& context);
}

}  // namespace flexidepth
