#include "cuda/gated_mlp.cuh"
#include "ops/linear.h"

namespace flexidepth::cuda {

void gated_activation(const char* op, const GatedMlpArgs& args, const Context& context) {
  with_type(args.gate.dtype, [&](auto type) {
    using T = decltype(type);
    run_product<T>(op, Input{args.y, args.gate.k, args.norm, args.eps},
                   Activation<T>{args.gate, args.up, args.activation}, args.gate.n, context);
  });
}

void gated_mlp(const char* op, const GatedMlpArgs& args, const Context& context) {
  gated_activation(op, args, context);
  LinearArgs down;
  down.x = {args.activation, args.gate.n, nullptr, args.y.count, args.y.live};
  down.outputs[0] = {args.down, args.h, true, args.scale};
  linear(down, context);
}

}  // namespace flexidepth::cuda
