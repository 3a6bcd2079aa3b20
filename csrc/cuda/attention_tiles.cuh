// Attention of many rows of a sequence, on the tensor cores: 64 queries of a head meet 64 tokens at
// a time (FlashAttention-2, arXiv 2307.08691). For each tile of tokens
//   S = Q K^T, m' = max(m, max S), P = 2^(S - m'), l' = l 2^(m - m') + sum P, O' = O 2^(m - m') + P
//   V
// with scale * log2(e) taken into Q. Tiles begin at multiples of 64, and one of which a row sees
// nothing leaves the row's state as it was: its bits do not depend on the other rows.
#pragma once

#include "cuda/kv_cache.cuh"
#include "cuda/rows.cuh"
#include "ops/attention.h"

namespace flexidepth::cuda {

constexpr int kQueryRows = 64;
constexpr int kTileTokens = 64;
constexpr int kAttentionTileWarps = kQueryRows / 16;
constexpr int kAttentionTileThreads = kAttentionTileWarps * kWarp;

static_assert(kPageTokens % kTileTokens == 0, "a tile of tokens lies in one page");

// 64 rows of one head; D: the most dimensions.
template <class T, int D>
struct QueryTile {
  // Bank conflicts: keys are read 16 bytes a lane, four lanes a row; values 16 bytes a row.
  static constexpr int kKeyStride = D + 32;
  static constexpr int kValueStride = D + 8;
  static constexpr size_t kSharedBytes =
      kTileTokens * (kKeyStride + kValueStride) * sizeof(T) + 2 * kQueryRows * sizeof(int32_t);

  const AttentionArgs& args;
  const KvLayout& layout = args.pages.layout;
  int lane = dev::thread() % kWarp, warp = dev::thread() / kWarp;
  int group = lane / 4, quarter = lane % 4;  // the lane's place in a fragment
  int head_dim = static_cast<int>(layout.head_dim);
  int64_t head = dev::block(1);
  int64_t kv_head = head / (args.num_heads / layout.num_kv_heads);
  int64_t first;  // row
  int rows;
  T* keys;             // [64 tokens][kKeyStride]
  T* values;           // [64 tokens][kValueStride]
  int32_t* positions;  // [64 rows]
  int32_t* sequences;  // [64 rows]

  uint32_t q[D / 32][2][4];    // rows `group` and `group + 8` of the warp, eight dimensions a chunk
  float out[D / 8][4] = {};    // accumulators of mma
  float peak[2], sum[2] = {};  // of the lane's two rows; sums over the lane's own tokens

  __device__ QueryTile(const AttentionArgs& a, int64_t first_row, int count, unsigned char* shared)
      : args(a), first(first_row), rows(count) {
    keys = reinterpret_cast<T*>(shared);
    values = keys + kTileTokens * kKeyStride;
    positions = reinterpret_cast<int32_t*>(values + kTileTokens * kValueStride);
    sequences = positions + kQueryRows;
    for (int i = dev::thread(); i < rows; i += kAttentionTileThreads) {
      const int64_t number = args.index == nullptr ? first + i : args.index[first + i];
      positions[i] = static_cast<int32_t>(args.positions[number]);
      sequences[i] = args.sequences[number];
    }
    peak[0] = peak[1] = -INFINITY;
    load_queries();
    dev::sync_block();
  }

  __device__ int own_row(int half) const { return warp * 16 + half * 8 + group; }
  __device__ int32_t begin_of(int32_t position) const {
    const auto window = static_cast<int32_t>(args.sliding_window);
    return window > 0 && position >= window ? position - window + 1 : 0;
  }

  __device__ void load_queries() {
    const float scale = args.scale * 1.44269504088896340736f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row(half);
      const float* from = row < rows ? row_of(args.q, first + row) + head * head_dim : nullptr;
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        const int dim = c * 32 + quarter * 8;
        const bool there = from != nullptr && dim < head_dim;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float low = there ? from[dim + 2 * w] * scale : 0.0f;
          const float high = there ? from[dim + 2 * w + 1] * scale : 0.0f;
          q[c][half][w] = dev::pack(low, high, T{});
        }
      }
    }
  }

  // Tokens [token, token + 64) of a sequence into shared memory, 0 beyond `last` and beyond
  // head_dim: what is not there may be NaN.
  __device__ void stage(int32_t sequence, int32_t token, int32_t last) {
    const T* from = layer_of_page<T>(args.pages, sequence, token / kPageTokens) +
                    key_offset(layout, kv_head, token % kPageTokens);
    const int64_t to_values = value_offset(layout);
    const int chunks = (head_dim + 31) / 32 * 4;
    for (int i = dev::thread(); i < kTileTokens * chunks; i += kAttentionTileThreads) {
      const int slot = i / chunks, dim = i % chunks * 8;
      Chunk k{}, v{};
      if (token + slot <= last && dim < head_dim) {
        k = dev::load_written(from + slot * head_dim + dim);
        v = dev::load_written(from + to_values + slot * head_dim + dim);
      }
      *reinterpret_cast<Chunk*>(keys + slot * kKeyStride + dim) = k;
      *reinterpret_cast<Chunk*>(values + slot * kValueStride + dim) = v;
    }
  }

  // s[n]: the lane's queries times tokens 8 n + 2 quarter and the next one.
  __device__ void scores(float (&s)[kTileTokens / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kTileTokens / 8; ++n) {
      s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
      const T* token = keys + (n * 8 + group) * kKeyStride + quarter * 8;
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        if (c * 32 >= head_dim) break;
        const Chunk k = *reinterpret_cast<const Chunk*>(token + c * 32);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t left[4] = {q[c][0][2 * step], q[c][1][2 * step], q[c][0][2 * step + 1],
                                    q[c][1][2 * step + 1]};
          const uint32_t right[2] = {k.word[2 * step], k.word[2 * step + 1]};
          dev::mma(s[n], left, right, T{});
        }
      }
    }
  }

  // Scores become weights; state and output fade to the new peak. `begin` > `end`: sees nothing.
  __device__ void soften(float (&s)[kTileTokens / 8][4], int half, int32_t token, int32_t begin,
                         int32_t end) {
    float high = peak[half];
#pragma unroll
    for (int n = 0; n < kTileTokens / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int32_t t = token + n * 8 + quarter * 2 + j;
        float& score = s[n][half * 2 + j];
        if (t < begin || t > end) score = -INFINITY;
        high = fmaxf(high, score);
      }
    high = fmaxf(high, dev::shuffle_xor(high, 1));
    high = fmaxf(high, dev::shuffle_xor(high, 2));
    const float keep = peak[half] == -INFINITY ? 0.0f : exp2f(peak[half] - high);
    peak[half] = high;
    float own = 0.0f;
#pragma unroll
    for (int n = 0; n < kTileTokens / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& score = s[n][half * 2 + j];
        score = score == -INFINITY ? 0.0f : exp2f(score - high);
        own += score;
      }
    sum[half] = sum[half] * keep + own;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      out[d][half * 2] *= keep;
      out[d][half * 2 + 1] *= keep;
    }
  }

  __device__ void add_values(const float (&p)[kTileTokens / 8][4]) {
#pragma unroll
    for (int step = 0; step < kTileTokens / 16; ++step) {
      const float (&low)[4] = p[2 * step];
      const float (&high)[4] = p[2 * step + 1];
      const uint32_t left[4] = {dev::pack(low[0], low[1], T{}), dev::pack(low[2], low[3], T{}),
                                dev::pack(high[0], high[1], T{}), dev::pack(high[2], high[3], T{})};
      // Lane i names row i % 8 of matrix i / 8: tokens 0-7 and 8-15, then the same of the next
      // eight dimensions.
      const T* row = values + (step * 16 + lane % 16) * kValueStride + lane / 16 * 8;
#pragma unroll
      for (int d = 0; d < D / 8; d += 2) {
        if (d * 8 >= head_dim) break;
        uint32_t v[4];
        dev::load_transposed(v, row + d * 8);
        dev::mma(out[d], left, {v[0], v[1]}, T{});
        dev::mma(out[d + 1], left, {v[2], v[3]}, T{});
      }
    }
  }

  // Rows [from, to) of the tile, which belong to one sequence.
  __device__ void attend(int from, int to) {
    int32_t last = positions[from], begin = begin_of(last);
    for (int i = from + 1; i < to; ++i) {
      const int32_t other = begin_of(positions[i]);
      last = positions[i] > last ? positions[i] : last;
      begin = other < begin ? other : begin;
    }
    for (int32_t token = begin / kTileTokens * kTileTokens; token <= last; token += kTileTokens) {
      dev::sync_block();  // nobody reads the tile before any more
      stage(sequences[from], token, last);
      dev::sync_block();
      float s[kTileTokens / 8][4];
      scores(s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own_row(half);
        const bool sees = row >= from && row < to;
        const int32_t position = sees ? positions[row] : -1;
        soften(s, half, token, sees ? begin_of(position) : 0, position);
      }
      add_values(s);
    }
  }

  __device__ void store() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half] + dev::shuffle_xor(sum[half], 1);
      total += dev::shuffle_xor(total, 2);
      const int row = own_row(half);
      if (row >= rows) continue;
      float* to = row_of(args.out, first + row) + head * head_dim + quarter * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        if (d * 8 >= head_dim) break;
        to[d * 8] = out[d][half * 2] / total;
        to[d * 8 + 1] = out[d][half * 2 + 1] / total;
      }
    }
  }
};

// Blocks: tiles of rows, those with the longest past first, times query heads.
template <class T, int D>
__global__ void __launch_bounds__(kAttentionTileThreads, D <= 64 ? 3 : 2)
    attention_tiles_kernel(const AttentionArgs args) {
  dev::await_inputs();
  const int64_t live = live_rows(args.q);
  const int64_t tiles = (args.q.count + kQueryRows - 1) / kQueryRows;
  const int64_t first = (tiles - 1 - dev::block(0)) * kQueryRows;
  if (first >= live) return;
  const int rows = static_cast<int>(live - first < kQueryRows ? live - first : kQueryRows);
  QueryTile<T, D> tile(args, first, rows, dev::shared_memory<unsigned char>());
  for (int from = 0; from < rows;) {
    int to = from + 1;
    while (to < rows && tile.sequences[to] == tile.sequences[from]) ++to;
    tile.attend(from, to);
    from = to;
  }
  tile.store();
}

}  // namespace flexidepth::cuda
