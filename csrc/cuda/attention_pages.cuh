// Attention of single rows, decoding: a block takes a page of 256 tokens, and the one that comes
// last joins the pages of a row.
#pragma once

#include "cuda/kv_cache.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/attention.h"

namespace flexidepth::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kHeads = 4;          // query heads of a block: they share what it reads
constexpr int kPartialFloats = 2;  // peak and sum, before head_dim values

// Softmax state of a head after some tokens: peak m, sum l, and the weighted values of the lane's
// own eight dimensions.
struct HeadStates {
  float peak[kHeads];
  float sum[kHeads];
  float out[kHeads][8];
};

// s e^(from - to), 0 where there was nothing yet.
__device__ __forceinline__ float faded(float value, float from, float to) {
  return from == -INFINITY ? 0.0f : value * expf(from - to);
}

// A token that is not seen has the weight 0, and v is 0 then: nothing changes, and no branch keeps
// one head from going on while another waits.
__device__ __forceinline__ void take(HeadStates& state, int h, bool seen, float score,
                                     const float (&v)[8]) {
  const float peak = seen ? fmaxf(state.peak[h], score) : state.peak[h];
  const float keep = faded(1.0f, state.peak[h], peak);
  const float weight = seen ? expf(score - peak) : 0.0f;
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
    const float own = faded(1.0f, state.peak[h], peak), other = faded(1.0f, other_peak, peak);
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

// A block takes a page of a row's context, the nth that the row sees, and some query heads of a KV
// head, which `part` counts over all KV heads. L lanes share a token, eight dimensions each. Which
// lanes and warps take a token depends on its place in the page alone, pages are joined in order,
// and so a row's result does not depend on the other rows. kAhead: tokens of a lane that are on
// their way while others are computed.
template <class T, int L, int kAhead>
struct PageOf {
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
  int part;
  int group = static_cast<int>(args.num_heads / layout.num_kv_heads);
  int parts = static_cast<int>(head_parts(args.num_heads, layout.num_kv_heads));
  int kv_head = part / parts;
  int first_head = kv_head * group + part % parts * kHeads;
  int heads =
      (kv_head + 1) * group - first_head < kHeads ? (kv_head + 1) * group - first_head : kHeads;
  int number = args.index == nullptr ? row : args.index[row];
  int position = static_cast<int>(args.positions[number]);
  int begin = args.sliding_window > 0 && position >= args.sliding_window
                  ? position - static_cast<int>(args.sliding_window) + 1
                  : 0;
  int first_page = begin / kPage;
  int num_pages = position / kPage - first_page + 1;
  int page;
  int dim = dev::thread() % L * 8;  // the lane's first dimension

  __device__ PageOf(const AttentionArgs& a, int64_t row_, int64_t part_, int64_t nth)
      : args(a),
        row(static_cast<int>(row_)),
        part(static_cast<int>(part_)),
        page(first_page + static_cast<int>(nth)) {}
  __device__ bool has_dims() const { return dim < layout.head_dim; }

  // States of the page's tokens in shared memory: [kAttentionWarps][kHeads][2 + head_dim].
  __device__ void compute(float* shared) const {
    const T* keys = layer_of_page<T>(args.pages, args.sequences[number], page) +
                    key_offset(layout, kv_head, 0) + dim;
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
      if (reinterpret_cast<uintptr_t>(own) % sizeof(Chunk) == 0) {
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
      for (int j = 0; j < 8; ++j) q[h][j] *= args.scale;
    const int base = page * kPage;
    const int last = position - base < kPage ? position - base + 1 : kPage;
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

  // Joins `count` states [2 + head_dim] that are `apart` floats apart, for dimension d.
  __device__ void join(const float* states, int count, int apart, int d, float& peak, float& sum,
                       float& out) const {
    peak = -INFINITY;
    for (int i = 0; i < count; ++i) peak = fmaxf(peak, states[i * apart]);
    sum = out = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float* state = states + i * apart;
      const float keep = faded(1.0f, state[0], peak);
      sum += state[1] * keep;
      out += state[kPartialFloats + d] * keep;
    }
  }

  // [page][2 + head_dim] of a head in scratch.
  __device__ float* partials(int64_t head) const {
    return args.scratch +
           (row * args.num_heads + head) * args.max_pages * (kPartialFloats + layout.head_dim);
  }

  __device__ void finish(float* shared) const {
    const int dims = static_cast<int>(layout.head_dim), width = kPartialFloats + dims;
    for (int at = dev::thread(); at < heads * dims; at += kAttentionThreads) {
      const int h = at / dims, d = at % dims;
      float peak, sum, out;
      join(shared + h * width, kAttentionWarps, kHeads * width, d, peak, sum, out);
      if (num_pages == 1) {
        row_of(args.out, row)[(first_head + h) * dims + d] = out / sum;
        continue;
      }
      float* to = partials(first_head + h) + (page - first_page) * width;
      if (d == 0) {
        to[0] = peak;
        to[1] = sum;
      }
      to[kPartialFloats + d] = out;
    }
    if (num_pages == 1) return;
    // The block that comes last joins the pages.
    auto* last = reinterpret_cast<int32_t*>(shared + kAttentionWarps * kHeads * width);
    dev::fence();
    dev::sync_block();
    int32_t* counter = args.counters + row * layout.num_kv_heads * parts + part;
    if (dev::thread() == 0) {
      dev::fence();
      *last = dev::fetch_add(counter, 1) == num_pages - 1;
    }
    dev::sync_block();
    if (*last == 0) return;
    dev::fence();
    for (int at = dev::thread(); at < heads * dims; at += kAttentionThreads) {
      const int h = at / dims, d = at % dims;
      float peak, sum, out;
      join(partials(first_head + h), num_pages, width, d, peak, sum, out);
      row_of(args.out, row)[(first_head + h) * dims + d] = out / sum;
    }
    if (dev::thread() == 0) *counter = 0;
  }
};

}  // namespace flexidepth::cuda
