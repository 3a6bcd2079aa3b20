// What every CPU op needs besides its arguments.
#pragma once

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace flexidepth::cpu {

struct Context {
  ThreadPool& pool;
  const Kernels& kernels;
};

// Row-wise work below this many floats is not worth waking a thread for.
constexpr int64_t kSerialFloats = 16384;

// body(begin, end) over rows, in this thread alone when the work is small.
template <class Body>
void for_rows(const Context& context, int64_t rows, int64_t floats_per_row, const Body& body) {
  if (rows * floats_per_row <= kSerialFloats) {
    body(int64_t{0}, rows);
  } else {
    context.pool.run(rows, 4, body);
  }
}

}  // namespace flexidepth::cpu
