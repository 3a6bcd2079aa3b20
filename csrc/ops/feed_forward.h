// Gate-scaled feed-forward of the running tokens: h[i] += w[i] * mlp(y[i]).
#pragma once

#include "ops/gated_mlp.h"

namespace flexidepth {

using FeedForwardArgs = GatedMlpArgs;  // scale = w, or null for a plain layer

namespace cpu {
void feed_forward(const FeedForwardArgs& args, const Context& context);
}
namespace cuda {
void feed_forward(const FeedForwardArgs& args, const Context& context);
}

}  // namespace flexidepth
