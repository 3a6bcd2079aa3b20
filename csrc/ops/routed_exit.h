// The second halves of a routed layer's feed-forward and adapter, in one phase, for up to 8 rows
// (CUDA alone):
//   h[i] += scale[i] * W_down activation[i]    running rows: the feed-forward's, scale = w
//                                              skipped rows: the adapter's, scale = 1 - w
// Every row is in one of the two lists, so the two write different rows of h.
#pragma once

#include "ops/gated_mlp.h"

namespace flexidepth {

struct RoutedExitArgs {
  GatedMlpArgs feed_forward;  // of each down, h, scale and activation are used, and y.live
  GatedMlpArgs adapter;
};

namespace cuda {
void routed_exit(const RoutedExitArgs& args, const Context& context);
}

}  // namespace flexidepth
