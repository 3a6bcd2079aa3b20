#include "cuda/rope.cuh"
#include "ops/rope.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) rope_table_kernel(const RopeTableArgs args) {
  dev::await_inputs();
  const int64_t i = dev::block(), half = args.head_dim / 2;
  for (int64_t j = dev::thread(); j < half; j += kThreads) rope_entry(args, i, j);
}

__global__ void __launch_bounds__(kThreads) rope_kernel(const RopeArgs args) {
  dev::await_inputs();
  const int64_t i = dev::block(), half = args.head_dim / 2;
  if (i >= live_rows(args.x)) return;
  const float* cos = row_of(args.cos_sin, i);
  float* x = row_of(args.x, i);
  for (int64_t at = dev::thread(); at < args.num_heads * half; at += kThreads) {
    const int64_t j = at % half;
    float* a = x + at / half * args.head_dim + j;
    const float first = a[0], second = a[half];
    a[0] = first * cos[j] - second * cos[half + j];
    a[half] = second * cos[j] + first * cos[half + j];
  }
}

}  // namespace

void rope_table(const RopeTableArgs& args, const Context& context) {
  if (args.rows == 0) return;
  dev::launch("rope_table", rope_table_kernel, grid_of(args.rows), kThreads, 0, context, args);
}

void rope(const RopeArgs& args, const Context& context) {
  if (args.x.count == 0) return;
  dev::launch("rope", rope_kernel, grid_of(args.x.count), kThreads, 0, context, args);
}

}  // namespace flexidepth::cuda
