#include "ops/feed_forward.h"

namespace flexidepth::cuda {

void feed_forward(const FeedForwardArgs& args, const Context& context) {
  gated_mlp("feed_forward", args, context);
}

}  // namespace flexidepth::cuda
