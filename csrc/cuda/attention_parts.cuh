// Attention of single rows, decoding: a block takes a part of a row's context, and the one that
// comes last joins the parts.
#pragma once

#include "cuda/kv_cache.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/attention.h"

namespace flexidepth::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kHeads = 4;          // query heads of a block: they share what it reads
constexpr int kPartialFloats = 4;  // peak, sum and two of no use, before head_dim values
constexpr int kLaneDims = 4;       // of a head, where a warp joins its states
constexpr float kLog2E = 1.44269504f;
static_assert(kHeads == kAttentionWarps && kWarp * kLaneDims >= 128);

// Tokens of a part: the fewer, the more blocks share a context, and the more there is to join: up
// to 16 pages at most the 32 parts that a warp joins in one turn.
constexpr int part_tokens(int num_pages) {
  if (num_pages > 32) return static_cast<int>(kPageTokens);
  return num_pages > 8 ? 128 : num_pages > 4 ? 64 : num_pages > 2 ? 32 : 16;
}
// The most parts of a context within so many pages.
constexpr int64_t most_parts(int64_t num_pages) {
  if (num_pages == 1) return kPageTokens / part_tokens(1);
  if (num_pages <= 16) return 32;
  return num_pages <= 32 ? 2 * num_pages : num_pages < 64 ? 64 : num_pages;
}

// Softmax state of a head after some tokens: peak m, sum l, and the weighted values of the lane's
// own eight dimensions. Scores, and so peaks, are times log2(e): weights are powers of two.
struct HeadStates {
  float peak[kHeads];
  float sum[kHeads];
  float out[kHeads][8];
};

// 2^(from - to), 0 where there was nothing yet (from is -inf, and so to may be): without a branch,
// so that no head waits for another one's.
__device__ __forceinline__ float faded(float from, float to) {
  return exp2f(from - fmaxf(to, -3.4e38f));
}

// A token that is not seen has the weight 0, and v is 0 then: nothing changes.
__device__ __forceinline__ void take(HeadStates& state, int h, bool seen, float score,
                                     const float (&v)[8]) {
  const float known = seen ? score : -INFINITY;
  const float peak = fmaxf(state.peak[h], known);
  const float keep = faded(state.peak[h], peak), weight = faded(known, peak);
  state.peak[h] = peak;
  state.sum[h] = state.sum[h] * keep + weight;
#pragma unroll
  for (int j = 0; j < 8; ++j) state.out[h][j] = fmaf(weight, v[j], state.out[h][j] * keep);
}

// Joins the states of lanes that are `lanes` apart; both get the result, computed in the same
// order.
__device__ __forceinline__ void join_lanes(HeadStates& state, int lanes) {
  const bool second = (dev::thread() & lanes) != 0;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float other_peak = dev::shuffle_xor(state.peak[h], lanes);
    const float other_sum = dev::shuffle_xor(state.sum[h], lanes);
    const float peak = fmaxf(state.peak[h], other_peak);
    const float own = faded(state.peak[h], peak), other = faded(other_peak, peak);
    const float a = state.sum[h] * own, b = other_sum * other;
    state.sum[h] = second ? b + a : a + b;
    state.peak[h] = peak;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float theirs = dev::shuffle_xor(state.out[h][j], lanes) * other;
      const float mine = state.out[h][j] * own;
      state.out[h][j] = second ? theirs + mine : mine + theirs;
    }
  }
}

// Blocks that share a KV head, each with up to kHeads of its query heads.
constexpr int64_t head_parts(int64_t num_heads, int64_t num_kv_heads) {
  return ceil_div(num_heads / num_kv_heads, kHeads);
}

// What a block needs in shared memory.
constexpr size_t attention_shared_bytes(int64_t head_dim) {
  return static_cast<size_t>(kAttentionWarps * kHeads * (kPartialFloats + head_dim) + 1) *
         sizeof(float);
}

// A block takes a part of a row's context, the nth that the row sees, and some query heads of a KV
// head, which `head_part` counts over all KV heads. L lanes share a token, eight dimensions each.
// How long a part is depends on the row's own pages, which lanes and warps take a token on its
// place in the part, parts are joined in a fixed order, and so a row's result does not depend on
// the other rows. kAhead: tokens of a lane that are on their way while others are computed.
template <class T, int L, int kAhead>
struct ContextPart {
  static constexpr int kSlots = kAttentionThreads / L;  // tokens at a time
  static constexpr int kPage = static_cast<int>(kPageTokens);

  // A lane's dimensions of a token; zeros of one that is not seen.
  struct Token {
    Eight<T> key;
    Eight<T> value;
    bool seen;
  };

  const AttentionArgs& args;
  const KvLayout& layout = args.pages.layout;
  int row;
  int head_part;
  int group = static_cast<int>(args.num_heads / layout.num_kv_heads);
  int parts = static_cast<int>(head_parts(args.num_heads, layout.num_kv_heads));
  int kv_head = head_part / parts;
  int first_head = kv_head * group + head_part % parts * kHeads;
  int heads =
      (kv_head + 1) * group - first_head < kHeads ? (kv_head + 1) * group - first_head : kHeads;
  int number = args.index == nullptr ? row : args.index[row];
  int position = static_cast<int>(args.positions[number]);
  int begin = args.sliding_window > 0 && position >= args.sliding_window
                  ? position - static_cast<int>(args.sliding_window) + 1
                  : 0;
  int tokens = part_tokens(position / kPage - begin / kPage + 1);  // of a part
  int first_part = begin / tokens;
  int num_parts = position / tokens - first_part + 1;
  int part;
  int dim = dev::thread() % L * 8;  // the lane's first dimension

  __device__ ContextPart(const AttentionArgs& a, int64_t row_, int64_t head_part_, int64_t nth)
      : args(a),
        row(static_cast<int>(row_)),
        head_part(static_cast<int>(head_part_)),
        part(first_part + static_cast<int>(nth)) {}
  __device__ bool has_dims() const { return dim < layout.head_dim; }

  // States of the part's tokens in shared memory:
  // [kAttentionWarps][kHeads][kPartialFloats + head_dim].
  __device__ void compute(float* shared) const {
    const int base = part * tokens;
    const T* keys = layer_of_page<T>(args.pages, args.sequences[number], base / kPage) +
                    key_offset(layout, kv_head, base % kPage) + dim;
    const T* values = keys + value_offset(layout);
    float q[kHeads][8];
    HeadStates state;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      state.peak[h] = -INFINITY;
      state.sum[h] = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        state.out[h][j] = 0.0f;
      }
      const float* own = row_of(args.q, row) + (first_head + h) * layout.head_dim + dim;
      const bool wanted = h < heads && has_dims();
      if (aligned(own)) {
        const Chunk half[2] = {dev::load_if(wanted, own), dev::load_if(wanted, own + 4)};
#pragma unroll
        for (int j = 0; j < 8; ++j) q[h][j] = dev::float_of(half[j / 4].word[j % 4]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) q[h][j] = wanted ? own[j] : 0.0f;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int j = 0; j < 8; ++j) q[h][j] *= args.scale * kLog2E;
    const int last = position - base < tokens ? position - base + 1 : tokens;
    const int first = begin - base, dims = static_cast<int>(layout.head_dim);
    const auto fetch = [&](int slot) {
      const bool seen = slot < last && slot >= first, wanted = seen && has_dims();
      return Token{fetch_eight_if<From::kCache>(wanted, keys + slot * dims),
                   fetch_eight_if<From::kCache>(wanted, values + slot * dims), seen};
    };
    const int own = dev::thread() / L;
    // As many turns for all lanes: they shuffle.
    Token ahead[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) ahead[a] = fetch(own + a * kSlots);
#pragma unroll 1
    for (int turn = 0; turn < last; turn += kAhead * kSlots) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const Token token = ahead[a];
        float k[8], v[8], score[kHeads] = {};
        unpack(token.key, k);
        ahead[a] = fetch(turn + own + (kAhead + a) * kSlots);
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int j = 0; j < 8; ++j) score[h] = fmaf(q[h][j], k[j], score[h]);
#pragma unroll
        for (int lanes = L / 2; lanes > 0; lanes /= 2)
#pragma unroll
          for (int h = 0; h < kHeads; ++h) score[h] += dev::shuffle_xor(score[h], lanes);
        unpack(token.value, v);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) take(state, h, token.seen, score[h], v);
      }
    }
#pragma unroll
    for (int lanes = L; lanes < kWarp; lanes *= 2) join_lanes(state, lanes);
    if (dev::thread() % kWarp < L && has_dims()) {
      const int64_t width = kPartialFloats + layout.head_dim;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float* to = shared + (dev::thread() / kWarp * kHeads + h) * width;
        if (dim == 0) {
          to[0] = state.peak[h];
          to[1] = state.sum[h];
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) to[kPartialFloats + dim + j] = state.out[h][j];
      }
    }
  }

  // The attention out of `count` states of a head that are `apart` floats apart, by one warp, for
  // kLaneDims dimensions of each lane: in order, but the sum, whose order the count gives.
  struct Joined {
    float peak;
    float sum;
    float out[kLaneDims];
  };
  __device__ Joined join(const float* states, int count, int apart) const {
    const int lane = dev::thread() % kWarp, own_dim = lane * kLaneDims;
    Joined joined{-INFINITY, 0.0f, {}};
    for (int i = lane; i < count; i += kWarp) joined.peak = fmaxf(joined.peak, states[i * apart]);
    joined.peak = warp_max(joined.peak);
    for (int first = 0; first < count; first += kWarp) {
      const int here = count - first < kWarp ? count - first : kWarp;
      float keep = 0.0f;
      if (lane < here) {
        const float* state = states + (first + lane) * apart;
        keep = faded(state[0], joined.peak);
        joined.sum = fmaf(state[1], keep, joined.sum);
      }
#pragma unroll 4
      for (int i = 0; i < here; ++i) {
        const float weight = dev::shuffle(keep, i);
        if (own_dim >= layout.head_dim) continue;
        const auto values = *reinterpret_cast<const Chunk*>(states + (first + i) * apart +
                                                            kPartialFloats + own_dim);
#pragma unroll
        for (int j = 0; j < kLaneDims; ++j)
          joined.out[j] = fmaf(dev::float_of(values.word[j]), weight, joined.out[j]);
      }
    }
    joined.sum = warp_sum(joined.sum);
    return joined;
  }

  // [part][kPartialFloats + head_dim] of a head in scratch.
  __device__ float* partials(int64_t head) const {
    return args.scratch + (row * args.num_heads + head) * most_parts(args.max_pages) *
                              (kPartialFloats + layout.head_dim);
  }

  // By the warp of the head.
  __device__ void write(const Joined& joined, int head) const {
    const int own_dim = dev::thread() % kWarp * kLaneDims, dims = static_cast<int>(layout.head_dim);
    if (own_dim >= dims) return;
    float* to = row_of(args.out, row) + head * dims + own_dim;
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) to[j] = joined.out[j] / joined.sum;
  }
  __device__ void keep(const Joined& joined, float* to) const {
    const int own_dim = dev::thread() % kWarp * kLaneDims;
    if (own_dim == 0) {
      to[0] = joined.peak;
      to[1] = joined.sum;
    }
    if (own_dim >= layout.head_dim) return;
    Chunk values;
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) values.word[j] = dev::bits_of(joined.out[j]);
    *reinterpret_cast<Chunk*>(to + kPartialFloats + own_dim) = values;
  }

  __device__ void finish(float* shared) const {
    const int width = kPartialFloats + static_cast<int>(layout.head_dim);
    const int h = dev::thread() / kWarp, head = first_head + h;
    if (h < heads) {
      const Joined own = join(shared + h * width, kAttentionWarps, kHeads * width);
      if (num_parts == 1) {
        write(own, head);
      } else {
        keep(own, partials(head) + (part - first_part) * width);
      }
    }
    if (num_parts == 1) return;
    // The block that comes last joins the parts. The first thread's fences are for all that the
    // block wrote before the barrier, and for what it reads behind the next one.
    auto* last = reinterpret_cast<int32_t*>(shared + kAttentionWarps * kHeads * width);
    dev::sync_block();
    int32_t* counter = args.counters + row * layout.num_kv_heads * parts + head_part;
    if (dev::thread() == 0) {
      dev::fence();
      *last = dev::fetch_add(counter, 1) == num_parts - 1;
      dev::fence();
    }
    dev::sync_block();
    if (*last == 0) return;
    if (h < heads) write(join(partials(head), num_parts, width), head);
    if (dev::thread() == 0) *counter = 0;
  }
};

}  // namespace flexidepth::cuda
