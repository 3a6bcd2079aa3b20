#include "ops/feed_forward.h"

namespace flexidepth::cpu {

void feed_forward(const FeedForwardArgs& args, const Context& context) { gated_mlp(args, context); }

}  // namespace flexidepth::cpu
