// The outputs of a matrix as an Op of matvec.cuh: a linear layer's, and the logits.
#pragma once

#include "cuda/products.cuh"
#include "ops/linear.h"

namespace flexidepth::cuda {

// Grows as the value does: the sign decides which way the other bits count.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = dev::bits_of(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// See best_token() of ops/lm_head.h.
__device__ __forceinline__ uint64_t best_key(float logit, int64_t token) {
  const uint32_t key = logit == logit ? ordered_bits(logit) : 0xffffffffu;
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~token);
}

template <class T>
struct Outputs {
  static constexpr bool kOftenFew = true;

  LinearOutput output;
  uint64_t* best;  // [rows] keys of the largest values, or null

  __device__ int64_t units() const { return paired_units(output.weight.n); }
  __device__ Pair<T> pair(int64_t unit) const { return paired_rows<T>(output.weight, unit); }

  __device__ void store(int64_t unit, int64_t row, float ya, float yb) const {
    const int64_t n = paired_output(unit);
    write(row, n, ya);
    if (n + 8 < output.weight.n) write(row, n + 8, yb);
  }

  __device__ void write(int64_t row, int64_t n, float sum) const {
    float* y = row_of(output.y, row) + n;
    const float value = sum + bias_of(output.weight, n);
    const float scale = output.scale == nullptr ? 1.0f : output.scale[row];
    *y = !output.accumulate ? value : fmaf(scale, value, *y);
    if (best == nullptr) return;
    // The largest one only grows: most values are seen to be smaller without a word to the others.
    const uint64_t key = best_key(value, n);
    if (key > *static_cast<volatile uint64_t*>(best + row)) dev::fetch_max(best + row, key);
  }
};

// Instantiated once, in linear.cu. x: the input's rows.
void run_output(const char* op, const Rows& x, const LinearOutput& output, const float* norm,
                float eps, uint64_t* best, const Context& context);

}  // namespace flexidepth::cuda
