#include "cuda/compact.cuh"
#include "cuda/launch.cuh"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;

// One block: rows keep their order because each knows how many before it run.
__global__ void __launch_bounds__(kThreads) compact_kernel(const CompactArgs args) {
  dev::await_inputs();
  auto* running = dev::shared_memory<int32_t>();  // [kWarps] rows of each warp that run
  const int lane = dev::thread() % kWarp, warp = dev::thread() / kWarp;
  int32_t before = 0;  // rows that run in the passes before
  for (int64_t begin = 0; begin < args.rows; begin += kThreads) {
    const int64_t i = begin + dev::thread();
    const bool there = i < args.rows;
    const float gate = there ? args.gates[i * args.gate_stride] : 0.0f;
    const bool run = there && row_runs(args, i, gate);
    const uint32_t votes = dev::ballot(run);
    if (lane == 0) running[warp] = dev::count_bits(votes);
    dev::sync_block();
    int32_t place = before, all = before;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += running[w];
      all += running[w];
    }
    place += dev::count_bits(votes & ((1u << lane) - 1u));
    if (there) write_decision(args, i, gate, run, run ? place : i - place);
    before = all;
    dev::sync_block();
  }
  if (dev::thread() == 0) {
    args.counts[0] = before;
    args.counts[1] = static_cast<int32_t>(args.rows) - before;
  }
}

}  // namespace

void compact(const CompactArgs& args, const Context& context) {
  dev::launch("compact", compact_kernel, grid_of(1), kThreads, kWarps * sizeof(int32_t), context,
              args);
}

}  // namespace flexidepth::cuda
