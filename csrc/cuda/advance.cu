#include "cuda/launch.cuh"
#include "ops/advance.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) advance_kernel(const AdvanceArgs args) {
  dev::await_inputs();
  const int64_t slot = *args.step % args.size, decisions = args.rows * args.num_routed;
  for (int64_t i = dev::thread(); i < args.rows; i += kThreads) {
    args.ring_tokens[slot * args.rows + i] = args.tokens[i];
    args.ring_logprobs[slot * args.rows + i] = args.logprobs[i];
    args.ring_faults[slot * args.rows + i] = args.faults[i];
    args.positions[i] += 1;
    args.draws[i] += 1;
  }
  for (int64_t i = dev::thread(); i < decisions; i += kThreads) {
    args.ring_gates[slot * decisions + i] = args.gates[i];
    args.ring_ran[slot * decisions + i] = args.ran[i];
  }
  dev::sync_block();  // everyone knows the slot
  if (dev::thread() == 0) *args.step += 1;
}

}  // namespace

void advance(const AdvanceArgs& args, const Context& context) {
  dev::launch("advance", advance_kernel, grid_of(1), kThreads, 0, context, args);
}

}  // namespace flexidepth::cuda
