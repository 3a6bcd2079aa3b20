// The inner loops of the CPU ops, one table of function pointers per instruction set. The table is
// chosen once (isa.h); everything above it is plain C++.
//
// Panel layout of a matrix W [n, k] (weights, and also keys and values in the cache): 16 outputs
// side by side, so that one vector load serves 16 outputs for one input. A step of a panel is 64
// bytes:
//   float32   one input for 16 outputs
//   bfloat16  two following inputs for 16 outputs, interleaved: [16][2]. A shift gives the even
//             input, a mask the odd one, and vdpbf16ps takes both
// Panels stand one after the other: [panel][step][64 bytes]. A matrix-vector product walks four of
// them side by side: the processor prefetches four streams further ahead than one (on Zen 3, one
// thread reads 19 GB/s so and 15 GB/s front to back; prefetching by hand made both slower).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace flexidepth::cpu {

constexpr int kPanel = 16;        // outputs in a panel
constexpr int kGroup = 4;         // panels that one panel_dot call takes at most
constexpr size_t kStep = 64;      // bytes of a panel's step
constexpr int kMaxTileRows = 12;  // input rows that one panel_dot call takes at most
constexpr int kRoundedRows = 32;  // input rows that one rounded_dot call takes at most
constexpr int64_t kRoundedInputs = 32;
constexpr int kSplitRows = 16;  // input rows that one split_dot call takes
constexpr int kMaxTile = kRoundedRows * kGroup * kPanel;  // floats in the largest output tile

constexpr size_t panel_bytes(DType dtype, int64_t k) {
  const auto inputs = static_cast<size_t>(k);
  return (dtype == DType::kFloat32 ? inputs : (inputs + 1) / 2) * kStep;
}

// Where panels lie: panel p starts at data + p * stride, its step s at + s * step.
struct Panels {
  const uint8_t* data;
  size_t stride;
  size_t step;
};

// tile[m][p * 16 + lane] = sum_k x[m][k] * w[p][k][lane] for m < rows, p < panels. Inputs are
// summed in order, fused multiply-add, 256 at a time into a fresh accumulator, and the partial sums
// in order: the result of an output never depends on rows or panels.
using PanelDot = void (*)(const float* const* x, int rows, int64_t k, const Panels& w, int panels,
                          float* tile);

// pairs[i] = x[2i], x[2i + 1] as bfloat16 in 32 bits; zeros behind k, up to a multiple of
// kRoundedInputs inputs.
using RoundRow = void (*)(const float* x, int64_t k, uint32_t* pairs);

// As PanelDot for bfloat16 panels, with inputs that were rounded before: row m begins at
// pairs + m * stride. Rows are read and rows of the tile are written by sixteens, of which those
// that are there count. Here 1024 inputs are summed at a time.
using RoundedDot = void (*)(const uint32_t* pairs, int64_t stride, int64_t k, const Panels& w,
                            int rows, int panels, float* tile);

// high[i] = x[2i], x[2i + 1] as bfloat16, low[i] = what that leaves of them, likewise; both as
// RoundRow. Together they hold 16 bits of each mantissa.
using SplitRow = void (*)(const float* x, int64_t k, uint32_t* high, uint32_t* low);

// out[m][p * 16 + lane] = sum_k (high + low)[m][k] * w[p][k][lane] for m < kSplitRows, p < panels:
// any number of bfloat16 panels times split rows. Row m of high and low begins at m * stride, of
// out at m * out_stride; all kSplitRows are read and written.
using SplitDot = void (*)(const uint32_t* high, const uint32_t* low, int64_t stride, int64_t k,
                          const Panels& w, int panels, float* out, int64_t out_stride);

struct Kernels {
  const char* name;
  PanelDot dot_f32;
  PanelDot dot_bf16;
  PanelDot dot_bf16_exact;  // never rounds x: attention uses it
  int max_tile_rows_1;      // rows that fit the registers with 1, 2, and 3 or 4 panels
  int max_tile_rows_2;
  int max_tile_rows_4;

  // sum of x[i]^2
  float (*sum_squares)(const float* x, int64_t n);
  // y[i] = (x[i] * scale) * weight[i]
  void (*scale_mul)(const float* x, float scale, const float* weight, float* y, int64_t n);
  // y[i] = x[i] + bias[i] (bias may be null)
  void (*store_row)(const float* x, const float* bias, float* y, int n);
  // y[i] += scale * (x[i] + bias[i]) (bias may be null)
  void (*accumulate_row)(const float* x, const float* bias, float scale, float* y, int n);
  // out[i] = silu(gate[i] + gate_bias[i]) * (up[i] + up_bias[i]) (biases may be null)
  void (*silu_mul_row)(const float* gate, const float* gate_bias, const float* up,
                       const float* up_bias, float* out, int n);
  void (*tanh_row)(const float* x, float* y, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  // s[i] *= scale for i < n; returns the maximum
  float (*scale_max)(float* s, float scale, int64_t n);
  // s[i] = exp(s[i] - peak) for i < n; returns the sum
  float (*exp_sum)(float* s, float peak, int64_t n);

  // Where the processor has a unit for it, bfloat16 weights take the rounded path.
  RoundRow round_row = nullptr;
  RoundedDot rounded_dot = nullptr;
  // And attention this one, in place of dot_bf16_exact.
  SplitRow split_row = nullptr;
  SplitDot split_dot = nullptr;
};

const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_amx();

}  // namespace flexidepth::cpu
