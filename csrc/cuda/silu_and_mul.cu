#include "core/check.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/silu_and_mul.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float silu_times(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

// A thread takes eight values of a row where rows are whole eights of 16 bytes, else one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    silu_and_mul_kernel(const SiluAndMulArgs args, const int64_t step) {
  dev::await_inputs();
  const auto *gate = static_cast<const T*>(args.gate), *up = static_cast<const T*>(args.up);
  auto* y = static_cast<T*>(args.y);
  const bool biased = args.gate_bias != nullptr || args.up_bias != nullptr;
  const auto bias = [&](const float* of, int64_t at) {
    return of == nullptr ? 0.0f : of[at % args.width];
  };
  const int64_t at = (dev::block() * kThreads + dev::thread()) * step;
  if (at >= args.rows * args.width) return;
  if (step == 1) {
    y[at] = from_float<T>(silu_times(to_float(gate[at]) + bias(args.gate_bias, at),
                                     to_float(up[at]) + bias(args.up_bias, at)));
    return;
  }
  float g[8], u[8];
  load_eight<From::kCache>(gate + at, g);
  load_eight<From::kCache>(up + at, u);
  Chunk out;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (biased) {
      g[j] += bias(args.gate_bias, at + j);
      u[j] += bias(args.up_bias, at + j);
    }
    g[j] = silu_times(g[j], u[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) out.word[j] = dev::pack(g[2 * j], g[2 * j + 1], T{});
  *reinterpret_cast<Chunk*>(y + at) = out;
}

}  // namespace

void silu_and_mul(const SiluAndMulArgs& args, const Context& context) {
  const int64_t values = args.rows * args.width;
  if (values == 0) return;
  check(size_of(args.dtype) == 2, ErrorKind::kUnsupported, "silu_and_mul: ", name_of(args.dtype),
        "; wanted a type of 16 bits, whose products are a library's");
  const bool eights = args.width % 8 == 0 && aligned(args.gate, args.up, args.y);
  const int64_t step = eights ? 8 : 1;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2)
      dev::launch("silu_and_mul", silu_and_mul_kernel<T>,
                  grid_of(ceil_div(values / step, kThreads)), kThreads, 0, context, args, step);
  });
}

}  // namespace flexidepth::cuda
