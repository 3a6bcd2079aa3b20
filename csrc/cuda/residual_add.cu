#include "core/check.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/residual_add.h"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 128;

// A block takes a row, a thread eight values of it where rows are whole eights of 16 bytes, else
// one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_add_kernel(const ResidualAddArgs args, const bool eights) {
  dev::await_inputs();
  const int64_t i = dev::block(), width = args.h.stride;
  const T* y = static_cast<const T*>(args.y) + i * width;
  float* h = row_of(args.h, i);
  const float scale = args.scale == nullptr ? 1.0f : args.scale[i];
  const auto bias = [&](int64_t j) { return args.bias == nullptr ? 0.0f : args.bias[j]; };
  if (!eights) {
    for (int64_t j = dev::thread(); j < width; j += kThreads)
      h[j] = fmaf(scale, to_float(y[j]) + bias(j), h[j]);
    return;
  }
  for (int64_t at = dev::thread() * 8; at < width; at += kThreads * 8) {
    float value[8];
    load_eight<From::kCache>(y + at, value);
    Chunk own[2] = {dev::load_written(h + at), dev::load_written(h + at + 4)};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t& word = own[j / 4].word[j % 4];
      word = dev::bits_of(fmaf(scale, value[j] + bias(at + j), dev::float_of(word)));
    }
    *reinterpret_cast<Chunk*>(h + at) = own[0];
    *reinterpret_cast<Chunk*>(h + at + 4) = own[1];
  }
}

}  // namespace

void residual_add(const ResidualAddArgs& args, const Context& context) {
  if (args.h.count == 0) return;
  check(size_of(args.dtype) == 2, ErrorKind::kUnsupported, "residual_add: ", name_of(args.dtype),
        "; wanted a type of 16 bits, whose products are a library's");
  const bool eights = args.h.stride % 8 == 0 && aligned(args.y, args.h.base);
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2)
      dev::launch("residual_add", residual_add_kernel<T>, grid_of(args.h.count), kThreads, 0,
                  context, args, eights);
  });
}

}  // namespace flexidepth::cuda
