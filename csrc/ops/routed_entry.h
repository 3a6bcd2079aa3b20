// What a routed layer computes from the residual stream once the router's codes are there, in one
// phase, for up to 8 rows and a folded router (CUDA alone):
//   w, run      of every row (ops/router.h, ops/compact.h)
//   k, v        of every row into the cache: rope(W_k x), W_v x   with x = input RMSNorm(h)
//   q           of the running rows: rope(W_q x)
//   activation  of the skipped rows: silu(W_gate y) * W_up y      with y = second RMSNorm(h)
// The last is the first half of the adapter: to a skipped row attention adds nothing, so it need
// not wait, and keys and values, which no skipped row waits for, are computed beside it. Whoever
// needs a decision computes the gates itself, from the codes, which costs no phase of its own; one
// block writes them and the decisions down for the phases behind. h is only read.
#pragma once

#include "ops/compact.h"
#include "ops/gated_mlp.h"
#include "ops/project.h"
#include "ops/router.h"

namespace flexidepth {

constexpr int64_t kMaxRouteRows = 8;

struct RoutedEntryArgs {
  // h and cos_sin: all rows, not listed. first: queries, rotated; row i of first_out is the i-th
  // that runs.
  ProjectArgs project;
  RouterGateArgs gate;  // folded; encoded is left as it is
  CompactArgs compact;
  // The adapter, of which y, h, down and scale are not used: row i of its activation is the i-th
  // that skips.
  GatedMlpArgs adapter;
};

namespace cuda {
void routed_entry(const RoutedEntryArgs& args, const Context& context);
}

}  // namespace flexidepth
