// Views that every op shares: a set of rows in a float32 matrix, and a weight matrix.
//
// Every pointer of an op's arguments is to memory of the op's device. What the CPU decides while it
// works, the host knows; what the GPU decides stays there, so counts of rows can be on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace flexidepth {

namespace cpu {
struct Context;  // cpu/context.h: the thread pool and the kernels of this processor
}
namespace cuda {
struct Context;  // cuda/context.h: the stream
}

// Rows of a float32 matrix, all of them or the listed ones: row i = base + (index ? index[i] : i) *
// stride.
template <class Float>
struct RowView {
  Float* base = nullptr;
  int64_t stride = 0;              // floats from row to row
  const int32_t* index = nullptr;  // [count], or null for rows 0, 1, 2, ...
  int64_t count = 0;
  // CUDA: how many of the rows there are, at most count, in device memory; null = count.
  const int32_t* live = nullptr;

  Float* row(int64_t i) const { return base + (index != nullptr ? index[i] : i) * stride; }
};
using Rows = RowView<const float>;
using MutableRows = RowView<float>;

// W [n, k] with an optional bias [n]: on the CPU in panel layout (cpu/kernels.h), with CUDA
// row-major as in the checkpoint.
struct PackedMatrix {
  const uint8_t* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t n = 0;  // outputs
  int64_t k = 0;  // inputs
  const float* bias = nullptr;
};

}  // namespace flexidepth
