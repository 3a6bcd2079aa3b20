#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/embed.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) embed_kernel(const EmbedArgs args) {
  dev::await_inputs();
  const T* from = weight_row<T>(args.weight, args.token_ids[dev::block()]);
  float* h = row_of(args.h, dev::block());
  for (int64_t j = dev::thread(); j < args.weight.k; j += kThreads) h[j] = to_float(from[j]);
}

}  // namespace

void embed(const EmbedArgs& args, const Context& context) {
  if (args.h.count == 0) return;
  with_type(args.weight.dtype, [&](auto type) {
    dev::launch("embed", embed_kernel<decltype(type)>, grid_of(args.h.count), kThreads, 0, context,
                args);
  });
}

}  // namespace flexidepth::cuda
