#include "cuda/launch.cuh"
#include "cuda/router.cuh"
#include "ops/linear.h"

namespace flexidepth::cuda {

namespace {

constexpr int kRowsPerBlock = 4;  // a warp each
constexpr int kThreads = kRowsPerBlock * kWarp;

__device__ __forceinline__ int64_t own_row() {
  return dev::block() * kRowsPerBlock + dev::thread() / kWarp;
}

__global__ void __launch_bounds__(kThreads) folded_kernel(const RouterGateArgs args) {
  dev::await_inputs();
  const int64_t i = own_row();
  if (i >= live_rows(args.encoded)) return;
  const float gate = folded_gate(args, row_of(args.encoded, i));
  if (dev::thread() % kWarp == 0) args.gates[i * args.gate_stride] = gate;
}

// e becomes z.
__global__ void __launch_bounds__(kThreads) code_kernel(const RouterGateArgs args) {
  dev::await_inputs();
  const int64_t i = own_row();
  if (i >= live_rows(args.encoded)) return;
  float* e = row_of(args.encoded, i);
  const float factor = code_factor(args, e);
  for (int64_t j = dev::thread() % kWarp; j < args.router_dim; j += kWarp)
    e[j] = code_value(args, e[j], factor, j);
}

__global__ void __launch_bounds__(kThreads) head_kernel(const RouterGateArgs args) {
  dev::await_inputs();
  const int64_t i = own_row();
  if (i >= live_rows(args.decoded)) return;
  const float* decoded = row_of(args.decoded, i);
  float logit = 0.0f;
  for (int64_t j = dev::thread() % kWarp; j < args.dec.n; j += kWarp)
    logit = fmaf(decoded[j], args.head[j], logit);
  logit = warp_sum(logit) + args.bias;
  if (dev::thread() % kWarp == 0) args.gates[i * args.gate_stride] = sigmoid(logit);
}

}  // namespace

void router_gate(const RouterGateArgs& args, const Context& context) {
  const int64_t rows = args.encoded.count;
  if (rows == 0) return;
  const dim3 grid = grid_of(ceil_div(rows, kRowsPerBlock));
  if (args.folded != nullptr) {
    dev::launch("router_gate", folded_kernel, grid, kThreads, 0, context, args);
    return;
  }
  dev::launch("router_gate", code_kernel, grid, kThreads, 0, context, args);
  LinearArgs decode;
  decode.x = {args.encoded.base, args.encoded.stride, args.encoded.index, rows, args.encoded.live};
  decode.outputs[0] = {args.dec, args.decoded, false, nullptr};
  linear(decode, context);
  dev::launch("router_gate", head_kernel, grid, kThreads, 0, context, args);
}

}  // namespace flexidepth::cuda
