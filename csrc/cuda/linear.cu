#include "core/check.h"
#include "cuda/outputs.cuh"
#include "ops/linear.h"

namespace flexidepth::cuda {

void run_output(const char* op, const Rows& x, const LinearOutput& output, const float* norm,
                float eps, uint64_t* best, const Context& context) {
  with_type(output.weight.dtype, [&](auto type) {
    using T = decltype(type);
    run_product<T>(op, Input{x, output.weight.k, norm, eps}, Outputs<T>{output, best},
                   paired_units(output.weight.n), context);
  });
}

void linear(const LinearArgs& args, const Context& context) {
  check(args.num_outputs == 1, ErrorKind::kUnsupported, "linear: ", args.num_outputs,
        " matrices; the CUDA op takes one, ops/project.h has the ones that share their input");
  run_output("linear", args.x, args.outputs[0], nullptr, 0.0f, nullptr, context);
}

}  // namespace flexidepth::cuda
