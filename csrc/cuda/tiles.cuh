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
constexpr int kTileAhead = 4;  // steps and rows whose loads are on their way together

// What a block shares beside the inputs.
struct TileRows {
  const float* rows[kTileRows];  // where they are
  float factor[kTileRows];       // of the norm
};

constexpr size_t kTileInputBytes = kTileRows * kTileStride * sizeof(uint16_t);
constexpr size_t kTileSharedBytes = kTileInputBytes + sizeof(TileRows);

// The instruction needs 16-bit weights whose rows are whole groups of 32 inputs.
template <class T>
constexpr bool tiles_fit(int64_t k) {
  return sizeof(T) == 2 && k % 32 == 0;
}

// Whether rows and norm can be loaded 16 bytes at a time.
__device__ __forceinline__ bool in_eights(const Input& in) {
  return aligned(in.x.base) && in.x.stride % 4 == 0 && aligned(in.norm);
}

// Inputs [at, at + inputs) of `rows` rows into x, [64][kTileStride], zeros behind them. A lane
// takes eight inputs in a row, a warp every fourth row, and asks for several before it writes the
// first.
template <class T>
__device__ __forceinline__ void stage_tile_eights(const Input& in, const TileRows& of, int rows,
                                                  int64_t at, int inputs, T* x) {
  const int own = dev::thread() % kWarp * 8, warp = dev::thread() / kWarp;
  const bool normed = in.norm != nullptr, mine = own < inputs;
  Chunk norm[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    norm[half] = dev::load_if(mine && normed, in.norm + at + own + half * 4);
#pragma unroll 1
  for (int first = warp; first < kTileRows; first += kTileAhead * kTileWarps) {
    Chunk value[kTileAhead][2];
#pragma unroll
    for (int a = 0; a < kTileAhead; ++a) {
      const int m = first + a * kTileWarps;
      const bool there = mine && m < rows;
      const float* from = (there ? of.rows[m] : in.x.base) + at + own;
#pragma unroll
      for (int half = 0; half < 2; ++half) value[a][half] = dev::load_if(there, from + half * 4);
    }
    if (!mine) continue;
#pragma unroll
    for (int a = 0; a < kTileAhead; ++a) {
      const int m = first + a * kTileWarps;
      const float factor = normed && m < rows ? of.factor[m] : 1.0f;
      Chunk out;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float two[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int j = 2 * i + side;
          two[side] = dev::float_of(value[a][j / 4].word[j % 4]);
          if (normed) two[side] = two[side] * factor * dev::float_of(norm[j / 4].word[j % 4]);
        }
        out.word[i] = dev::pack(two[0], two[1], T{});
      }
      *reinterpret_cast<Chunk*>(x + m * kTileStride + own) = out;
    }
  }
}

// The same one by one, wherever rows begin.
template <class T>
__device__ __forceinline__ void stage_tile_anywhere(const Input& in, const TileRows& of, int rows,
                                                    int64_t at, int inputs, T* x) {
#pragma unroll 1
  for (int i = dev::thread(); i < kTileRows * inputs; i += kTileThreads) {
    const int m = i / inputs, j = i % inputs;
    float value = 0.0f;
    if (m < rows) {
      value = of.rows[m][at + j];
      if (in.norm != nullptr) value = value * of.factor[m] * in.norm[at + j];
    }
    x[m * kTileStride + j] = from_float<T>(value);
  }
}

// Adds to sum what the inputs in x give with their weights.
template <class T>
__device__ __forceinline__ void add_tile_products(const Pair<T>& pair, const T* x, int rows,
                                                  int64_t at, int inputs,
                                                  float (&sum)[kTileRows / 16][2][4]) {
  const int lane = dev::thread() % kWarp, group = lane / 4, quarter = lane % 4;
#pragma unroll 1
  for (int begin = 0; begin < inputs; begin += kTileAhead * 32) {
    Chunk w[kTileAhead][2];
#pragma unroll
    for (int ahead = 0; ahead < kTileAhead; ++ahead)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const T* row = side == 0 ? pair.a : pair.b;
        const int j = begin + ahead * 32;
        w[ahead][side] =
            dev::load_once_if(row != nullptr && j < inputs, row + at + j + quarter * 8);
      }
#pragma unroll
    for (int ahead = 0; ahead < kTileAhead; ++ahead) {
      const int j = begin + ahead * 32;
      if (j >= inputs) break;
#pragma unroll
      for (int tile = 0; tile < kTileRows / 16; ++tile) {
        if (tile * 16 >= rows) break;  // the same for the whole block
        const T* low = x + (tile * 16 + group) * kTileStride + j + quarter * 8;
        const Chunk a[2] = {*reinterpret_cast<const Chunk*>(low),
                            *reinterpret_cast<const Chunk*>(low + 8 * kTileStride)};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t left[4] = {a[0].word[2 * step], a[1].word[2 * step],
                                    a[0].word[2 * step + 1], a[1].word[2 * step + 1]};
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const Chunk& weights = w[ahead][side];
            const uint32_t right[2] = {weights.word[2 * step], weights.word[2 * step + 1]};
            dev::mma(sum[tile][side], left, right, T{});
          }
        }
      }
    }
  }
}

// Rows [begin, begin + 64) of the input times the block's pairs.
template <class T, class Op>
__device__ void tile_product(const Input& in, int64_t begin, const Op& op, unsigned char* shared) {
  auto* x = reinterpret_cast<T*>(shared);  // [64][kTileStride]
  auto& of = *reinterpret_cast<TileRows*>(shared + kTileInputBytes);
  const int lane = dev::thread() % kWarp, warp = dev::thread() / kWarp;
  const int group = lane / 4, quarter = lane % 4;
  const int64_t live = live_rows(in.x);
  const int rows = static_cast<int>(live - begin < kTileRows ? live - begin : kTileRows);
  const bool eights = in_eights(in);
  if (dev::thread() < rows) of.rows[dev::thread()] = row_of(in.x, begin + dev::thread());
  if (in.norm != nullptr) {
    dev::sync_block();
    for (int m = warp; m < rows; m += kTileWarps) {
      const float own = norm_factor_of_warp(in, of.rows[m]);
      if (lane == 0) of.factor[m] = own;
    }
  }
  const int64_t first = (dev::block() * kTileWarps + warp) * 8;  // unit of the warp's first pair
  const int64_t unit = first + group;
  const Pair<T> pair = unit < op.units() ? op.pair(unit) : Pair<T>{nullptr, nullptr};
  float sum[kTileRows / 16][2][4] = {};
  for (int64_t at = 0; at < in.k; at += kTileInputs) {
    dev::sync_block();  // rows and factors are there; nobody reads the last inputs any more
    const int inputs = static_cast<int>(in.k - at < kTileInputs ? in.k - at : kTileInputs);
    if (eights) {
      stage_tile_eights(in, of, rows, at, inputs, x);
    } else {
      stage_tile_anywhere(in, of, rows, at, inputs, x);
    }
    dev::sync_block();
    add_tile_products(pair, x, rows, at, inputs, sum);
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
