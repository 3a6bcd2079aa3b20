// Kernels with one mistake each, and one without: what the emulation has to see.
#include <pybind11/pybind11.h>

#include "cuda/launch.cuh"

namespace flexidepth::emulation {

namespace {

using namespace flexidepth::cuda;

constexpr int kThreads = 64;

// out[i] = in[63 - i] by way of shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  auto* shared = dev::shared_memory<float>();
  shared[dev::thread()] = in[dev::thread()];
  if (kBarrier) dev::sync_block();
  out[dev::thread()] = shared[kThreads - 1 - dev::thread()];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (dev::thread() < 40) dev::sync_block();
  out[dev::thread()] = 1.0f;
}

__global__ void two_barriers_kernel(float* out) {
  if (dev::thread() < 32) {
    dev::sync_block();
  } else {
    dev::sync_block();
  }
  out[dev::thread()] = 1.0f;
}

__global__ void divergent_shuffle_kernel(float* out) {
  if (dev::thread() % 2 == 0) out[dev::thread()] = dev::shuffle_xor(1.0f, 2);
}

__global__ void behind_the_end_kernel(float* out) {
  auto* shared = dev::shared_memory<float>();
  shared[dev::thread() + 1] = 0.0f;
  out[dev::thread()] = shared[dev::thread()];
}

__global__ void misaligned_kernel(const float* in, float* out) {
  out[dev::thread()] = dev::float_of(dev::load_once(in + 1).word[0]);
}

// Blocks pass a number on, one after the other; out[b] = what block b found. kBroken: which
// mistake.
enum class Mistake { kNone, kNoBarrier, kLeaves, kDiverges, kNotAtRest, kReadsAsWeights };
template <Mistake kMistake>
__global__ void pass_on_kernel(float* out, uint32_t* barrier) {
  const auto blocks = static_cast<int>(dev::blocks()), own = static_cast<int>(dev::block());
  for (int turn = 0; turn < blocks; ++turn) {
    if (own == turn && dev::thread() == 0) out[own] = own == 0 ? 1.0f : out[own - 1] + 1.0f;
    if (kMistake == Mistake::kNoBarrier) continue;
    if (kMistake == Mistake::kLeaves && own == 1) return;
    if (kMistake == Mistake::kReadsAsWeights) dev::load_once(out);
    if (kMistake == Mistake::kDiverges && own == 1) {
      dev::wait_for_grid(barrier, dev::arrive_at_grid(barrier));
    } else {
      dev::wait_for_grid(barrier, dev::arrive_at_grid(barrier));
    }
  }
  if (kMistake == Mistake::kNotAtRest && own == 0 && dev::thread() == 0) *barrier += 1;
}

__global__ void plain_launch_kernel(uint32_t* barrier) { dev::arrive_at_grid(barrier); }

}  // namespace

void register_broken_kernels(pybind11::module_& m) {
  m.def("run_broken", [](const std::string& name, uintptr_t in_address, uintptr_t out_address) {
    const auto* in = reinterpret_cast<const float*>(in_address);
    auto* out = reinterpret_cast<float*>(out_address);
    const Context context;
    const size_t bytes = kThreads * sizeof(float);
    const char* op = name.c_str();
    if (name == "whole")
      dev::launch(op, reverse_kernel<true>, dim3(1), kThreads, bytes, context, in, out);
    if (name == "missing_barrier")
      dev::launch(op, reverse_kernel<false>, dim3(1), kThreads, bytes, context, in, out);
    if (name == "divergent_barrier")
      dev::launch(op, divergent_barrier_kernel, dim3(1), kThreads, 0, context, out);
    if (name == "two_barriers")
      dev::launch(op, two_barriers_kernel, dim3(1), kThreads, 0, context, out);
    if (name == "divergent_shuffle")
      dev::launch(op, divergent_shuffle_kernel, dim3(1), kThreads, 0, context, out);
    if (name == "behind_the_end")
      dev::launch(op, behind_the_end_kernel, dim3(1), kThreads, bytes, context, out);
    if (name == "misaligned")
      dev::launch(op, misaligned_kernel, dim3(1), kThreads, 0, context, in, out);
  });
  m.def("run_broken_grid", [](const std::string& name, uintptr_t out_address, uintptr_t barrier_) {
    auto* out = reinterpret_cast<float*>(out_address);
    auto* barrier = reinterpret_cast<uint32_t*>(barrier_);
    const Context context;
    const char* op = name.c_str();
    const auto run = [&](void (*kernel)(float*, uint32_t*)) {
      launch_resident(op, kernel, kThreads, 0, context, out, barrier);
    };
    if (name == "whole") run(pass_on_kernel<Mistake::kNone>);
    if (name == "no_barrier") run(pass_on_kernel<Mistake::kNoBarrier>);
    if (name == "leaves") run(pass_on_kernel<Mistake::kLeaves>);
    if (name == "diverges") run(pass_on_kernel<Mistake::kDiverges>);
    if (name == "not_at_rest") run(pass_on_kernel<Mistake::kNotAtRest>);
    if (name == "reads_as_weights") run(pass_on_kernel<Mistake::kReadsAsWeights>);
    if (name == "plain_launch")
      dev::launch(op, plain_launch_kernel, dim3(2), kThreads, 0, context, barrier);
  });
}

}  // namespace flexidepth::emulation
