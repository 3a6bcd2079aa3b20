#include "cuda/matvec.cuh"
#include "ops/rms_norm.h"

namespace flexidepth::cuda {

namespace {

// A block takes a row; its order of summation is the one of the fused norms.
__global__ void __launch_bounds__(kMatvecThreads) rms_norm_kernel(const RmsNormArgs args) {
  dev::await_inputs();
  const int64_t i = dev::block();
  if (i >= live_rows(args.x)) return;
  const float* x = row_of(args.x, i);
  using Sums = float[kMatvecWarps];
  const float factor = norm_factor_of_block({args.x, args.width, args.weight, args.eps}, x,
                                            *dev::shared_memory<Sums>());
  float* y = row_of(args.y, i);
  for (int64_t j = dev::thread(); j < args.width; j += kMatvecThreads)
    y[j] = x[j] * factor * args.weight[j];
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Context& context) {
  if (args.x.count == 0) return;
  dev::launch("rms_norm", rms_norm_kernel, grid_of(args.x.count), kMatvecThreads,
              kMatvecWarps * sizeof(float), context, args);
}

}  // namespace flexidepth::cuda
