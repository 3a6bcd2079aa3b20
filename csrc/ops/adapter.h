// Adapter of the skipped tokens: h[i] += (1 - w[i]) * W_out( silu(W_gate y[i]) * W_up y[i] ).
#pragma once

#include "ops/gated_mlp.h"

namespace flexidepth {

using AdapterArgs = GatedMlpArgs;  // scale = 1 - w

namespace cpu {
void adapter(const AdapterArgs& args, const Context& context);
}
namespace cuda {
void adapter(const AdapterArgs& args, const Context& context);
}

}  // namespace flexidepth
