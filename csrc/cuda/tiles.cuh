// Products of up to 64 rows with a matrix on the tensor cores: y[m, n] = sum_k x[m, k] W[n, k].
//
// A block stages 64 rows of x, gathered, normed if wanted, rounded to the weights' type, 256 inputs
// at a time. A warp takes 8 pairs of outputs (a, b): two tiles of mma.m16n8k16 beside each other,
// for all 64 rows. Weights go from memory to registers by loads of 16 bytes: a lane takes 8 inputs
// in a row, which are two steps of the instruction if x is read in the same order, since a sum does
// not mind which input is called which.
#pragma once

#include "cuda/matvec.cuh"

namespace flexidepth::cuda {

constexpr int kTileRows = 64;
constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;
constexpr int kTileUnits = kTileWarps * 8;     // pairs of a block
constexpr int kTileInputs = 256;               // inputs in shared memory at a time
constexpr int kTileStride = kTileInputs + 32;  // two rows fill the banks without a conflict
constexpr size_t kTileSharedBytes =
    kTileRows * kTileStride * sizeof(uint16_t) + kTileRows * sizeof(float);

// The instruction needs 16-bit weights whose rows are whole groups of 32 inputs.
template <class T>
constexpr bool tiles_fit(int64_t k) {
  return sizeof(T) == 2 && k % 32 == 0;
}

// One row's norm factor, by one warp.
__device__ __forceinline__ float norm_factor(const Input& in, const float* row) {
  float sum = 0.0f;
  for (int64_t i = dev::thread() % kWarp; i < in.k; i += kWarp) sum = fmaf(row[i], row[i], sum);
  return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(in.k) + in.eps);
}

// Rows [begin, begin + 64) of the input times the block's pairs.
template <class T, class Op>
__device__ void tile_product(const Input& in, int64_t begin, const Op& op, unsigned char* shared) {
  auto* x = reinterpret_cast<T*>(shared);                                // [64][kTileStride]
  auto* factor = reinterpret_cast<float*>(x + kTileRows * kTileStride);  // [64]
  const int lane = dev::thread() % kWarp, warp = dev::thread() / kWarp;
  const int group = lane / 4, quarter = lane % 4;
  const int64_t live = live_rows(in.x);
  const int rows = static_cast<int>(live - begin < kTileRows ? live - begin : kTileRows);
  if (in.norm != nullptr) {
    for (int m = warp; m < rows; m += kTileWarps) {
      const float own = norm_factor(in, row_of(in.x, begin + m));
      if (lane == 0) factor[m] = own;
    }
  }
  const int64_t first = (dev::block() * kTileWarps + warp) * 8;  // unit of the warp's first pair
  const int64_t unit = first + group;
  const Pair<T> pair = unit < op.units() ? op.pair(unit) : Pair<T>{nullptr, nullptr};
  float sum[kTileRows / 16][2][4] = {};
  for (int64_t at = 0; at < in.k; at += kTileInputs) {
    dev::sync_block();  // the factors are there; nobody reads the last inputs any more
    const int inputs = static_cast<int>(in.k - at < kTileInputs ? in.k - at : kTileInputs);
    for (int i = dev::thread(); i < kTileRows * inputs; i += kTileThreads) {
      const int m = i / inputs, j = i % inputs;
      float value = 0.0f;
      if (m < rows) {
        value = row_of(in.x, begin + m)[at + j];
        if (in.norm != nullptr) value = value * factor[m] * in.norm[at + j];
      }
      x[m * kTileStride + j] = from_float<T>(value);
    }
    dev::sync_block();
    for (int j = 0; j < inputs; j += 32) {
      Chunk w[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const T* row = side == 0 ? pair.a : pair.b;
        w[side] = row == nullptr ? Chunk{} : dev::load_once(row + at + j + quarter * 8);
      }
#pragma unroll
      for (int tile = 0; tile < kTileRows / 16; ++tile) {
        if (tile * 16 >= rows) break;  // the same for the whole block
        const T* low = x + (tile * 16 + group) * kTileStride + j + quarter * 8;
        const T* high = low + 8 * kTileStride;
        Chunk a[2];
        a[0] = *reinterpret_cast<const Chunk*>(low);
        a[1] = *reinterpret_cast<const Chunk*>(high);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t left[4] = {a[0].word[2 * step], a[1].word[2 * step],
                                    a[0].word[2 * step + 1], a[1].word[2 * step + 1]};
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const uint32_t right[2] = {w[side].word[2 * step], w[side].word[2 * step + 1]};
            dev::mma(sum[tile][side], left, right, T{});
          }
        }
      }
    }
  }
  // By way of shared memory, where x is needed no more: neighbours then write what lies side by
  // side.
  dev::sync_block();
  auto* sums = reinterpret_cast<float*>(shared);  // [64][kTileUnits][2]
#pragma unroll
  for (int tile = 0; tile < kTileRows / 16; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = tile * 16 + group + (i / 2) * 8, u = warp * 8 + quarter * 2 + i % 2;
      sums[(m * kTileUnits + u) * 2] = sum[tile][0][i];
      sums[(m * kTileUnits + u) * 2 + 1] = sum[tile][1][i];
    }
  dev::sync_block();
  for (int i = dev::thread(); i < rows * kTileUnits; i += kTileThreads) {
    const int64_t own = dev::block() * kTileUnits + i % kTileUnits;
    if (own < op.units() && op.pair(own).a != nullptr)
      op.store(own, begin + i / kTileUnits, sums[2 * i], sums[2 * i + 1]);
  }
}

}  // namespace flexidepth::cuda
