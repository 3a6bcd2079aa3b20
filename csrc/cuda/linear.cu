#include "cuda/outputs.cuh"
#include "ops/linear.h"

namespace flexidepth::cuda {

void run_outputs(const char* op, const LinearArgs& args, const float* norm, float eps,
                 uint64_t* best, const Context& context) {
  const PackedMatrix& first = args.outputs[0].weight;
  int64_t units = 0;
  for (int i = 0; i < args.num_outputs; ++i) units += paired_units(args.outputs[i].weight.n);
  with_type(first.dtype, [&](auto type) {
    using T = decltype(type);
    Outputs<T> outputs;
    outputs.count = args.num_outputs;
    outputs.best = best;
    for (int i = 0; i < args.num_outputs; ++i) outputs.output[i] = args.outputs[i];
    run_product<T>(op, Input{args.x, first.k, norm, eps}, outputs, units, context);
  });
}

void linear(const LinearArgs& args, const Context& context) {
  run_outputs("linear", args, nullptr, 0.0f, nullptr, context);
}

}  // namespace flexidepth::cuda
