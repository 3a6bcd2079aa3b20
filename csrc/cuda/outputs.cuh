// The outputs of up to three matrices that share their input, as an Op of matvec.cuh: a linear
// layer's, and the logits.
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
  LinearOutput output[kMaxLinearOutputs];
  int count;
  uint64_t* best;  // [rows] keys of the first output's largest values, or null

  __device__ int64_t units() const {
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += paired_units(output[i].weight.n);
    return sum;
  }

  // The matrix of a pair; unit becomes its number among that matrix's own.
  __device__ const LinearOutput& at(int64_t& unit) const {
    int i = 0;
    while (i + 1 < count && unit >= paired_units(output[i].weight.n))
      unit -= paired_units(output[i++].weight.n);
    return output[i];
  }

  __device__ Pair<T> pair(int64_t unit) const {
    const PackedMatrix& w = at(unit).weight;  // unit changes
    return paired_rows<T>(w, unit);
  }

  __device__ void store(int64_t unit, int64_t row, float ya, float yb) const {
    const LinearOutput& out = at(unit);
    const int64_t n = paired_output(unit);
    write(out, row, n, ya);
    if (n + 8 < out.weight.n) write(out, row, n + 8, yb);
  }

  __device__ void write(const LinearOutput& out, int64_t row, int64_t n, float sum) const {
    float* y = row_of(out.y, row) + n;
    const float value = sum + bias_of(out.weight, n);
    *y = !out.accumulate ? value : fmaf(out.scale == nullptr ? 1.0f : out.scale[row], value, *y);
    if (best == nullptr) return;
    // The largest one only grows: most values are seen to be smaller without a word to the others.
    const uint64_t key = best_key(value, n);
    if (key > *static_cast<volatile uint64_t*>(best + row)) dev::fetch_max(best + row, key);
  }
};

// Instantiated once, in linear.cu.
void run_outputs(const char* op, const LinearArgs& args, const float* norm, float eps,
                 uint64_t* best, const Context& context);

}  // namespace flexidepth::cuda
