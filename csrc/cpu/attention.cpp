#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/tiles.h"

namespace flexidepth::cpu {

namespace {

constexpr int64_t kPadDim = 16;
constexpr int64_t kMostQueries = kSplitRows > kMaxTileRows ? kSplitRows : kMaxTileRows;
// Pairs of a row of inputs, head_dim or tokens of a page, and a line more: a power of two apart,
// rows would fall on the same lines of the cache.
constexpr int64_t kSplitStride = kPageTokens / 2 + 16;
static_assert(kMaxHeadDim <= kPageTokens && kPageTokens % kRoundedInputs == 0);
// Split the pages of a row over threads up to this many (tile, page) units; beyond, tiles are
// enough.
constexpr int64_t kMaxSplitUnits = 512;

// Queries that share a KV head and a sequence: some rows times the heads of the group, as many as
// the kernel takes.
struct Tile {
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t kv_head = 0;
  int64_t first_head = 0;
  int64_t heads = 0;
  int64_t queries() const { return rows * heads; }
};

// Rows of inputs as the kernel takes them.
struct Inputs {
  const float* rows[kMostQueries];
  // Where the kernel takes halves.
  alignas(64) uint32_t high[kSplitRows * kSplitStride];
  alignas(64) uint32_t low[kSplitRows * kSplitStride];
};

// Softmax state of the queries of a tile after some pages: peak m, sum l, weighted values o.
struct Partial {
  float* peak;
  float* sum;
  float* out;  // [queries][padded head_dim]
};

class Attention {
 public:
  Attention(const AttentionArgs& args, const Context& context)
      : args_(args),
        kernels_(context.kernels),
        group_(args.num_heads / args.pages.layout.num_kv_heads),
        padded_dim_(args.pages.layout.value_panels() * kPadDim),
        split_(kernels_.split_dot != nullptr && args.pages.layout.dtype == DType::kBFloat16) {
    const int64_t most = split_ ? kSplitRows : kMaxTileRows;
    heads_per_tile_ = std::min<int64_t>(group_, most);
    rows_per_tile_ = std::max<int64_t>(1, most / heads_per_tile_);
    tiles_per_kv_head_ = (group_ + heads_per_tile_ - 1) / heads_per_tile_;
  }

  int64_t tiles_per_row_block() const {
    return args_.pages.layout.num_kv_heads * tiles_per_kv_head_;
  }
  int64_t rows_per_tile() const { return rows_per_tile_; }
  int64_t partial_floats() const { return kMostQueries * (padded_dim_ + 2); }

  Tile tile(int64_t first_row, int64_t rows, int64_t which) const {
    Tile t;
    t.first_row = first_row;
    t.rows = rows;
    t.kv_head = which / tiles_per_kv_head_;
    const int64_t part = which % tiles_per_kv_head_ * heads_per_tile_;
    t.first_head = t.kv_head * group_ + part;
    t.heads = std::min(heads_per_tile_, group_ - part);
    return t;
  }

  Partial partial_at(float* scratch) const {
    return {scratch, scratch + kMostQueries, scratch + 2 * kMostQueries};
  }

  // First token that a query at `position` sees.
  int64_t window_start(int64_t position) const {
    return args_.sliding_window > 0 ? std::max<int64_t>(0, position - args_.sliding_window + 1) : 0;
  }
  int64_t first_page(const Tile& t) const {
    return window_start(args_.position(t.first_row)) / kPageTokens;
  }
  int64_t last_page(const Tile& t) const {
    return args_.position(t.first_row + t.rows - 1) / kPageTokens;
  }

  // A tile's queries, which all its pages take.
  void find_queries(const Tile& t, Inputs& queries) const {
    for (int64_t i = 0; i < t.queries(); ++i)
      queries.rows[i] = args_.q.row(t.first_row + i / t.heads) +
                        (t.first_head + i % t.heads) * args_.pages.layout.head_dim;
    split(t, args_.pages.layout.head_dim, queries);
  }

  // One page into a fresh partial. A query that sees nothing of the page gets peak -inf, sum 0.
  void page(const Tile& t, const Inputs& queries, int64_t page, const Partial& result) const {
    alignas(64) float scores[kMostQueries * kPageTokens];
    const uint8_t* base =
        args_.pages.tables[args_.sequence(t.first_row)][page] + args_.pages.layer_offset;
    const int64_t page_start = page * kPageTokens;
    const int64_t tokens =
        std::min(kPageTokens, args_.position(t.first_row + t.rows - 1) + 1 - page_start);
    dot_panels(queries, t.queries(), args_.pages.layout.head_dim,
               base + args_.pages.layout.key_offset(t.kv_head, 0),
               args_.pages.layout.key_panel_bytes(), (tokens + kPanel - 1) / kPanel, scores,
               kPageTokens);
    for (int64_t i = 0; i < t.queries(); ++i) {
      const int64_t position = args_.position(t.first_row + i / t.heads);
      const int64_t end = std::clamp<int64_t>(position + 1 - page_start, 0, tokens);
      const int64_t begin = std::clamp<int64_t>(window_start(position) - page_start, 0, end);
      float* s = scores + i * kPageTokens;
      std::fill(s, s + begin, 0.0f);
      std::fill(s + end, s + tokens, 0.0f);
      if (begin == end) {
        result.peak[i] = -std::numeric_limits<float>::infinity();
        result.sum[i] = 0.0f;
        continue;
      }
      result.peak[i] = kernels_.scale_max(s + begin, args_.scale, end - begin);
      result.sum[i] = kernels_.exp_sum(s + begin, result.peak[i], end - begin);
    }
    Inputs weights;
    for (int64_t i = 0; i < t.queries(); ++i) weights.rows[i] = scores + i * kPageTokens;
    split(t, tokens, weights);
    dot_panels(weights, t.queries(), tokens, base + args_.pages.layout.value_offset(t.kv_head, 0),
               args_.pages.layout.value_panel_bytes(), args_.pages.layout.value_panels(),
               result.out, padded_dim_);
  }

  // state <- state merged with next; the formulas of attention.h.
  void merge(const Tile& t, const Partial& next, const Partial& state) const {
    for (int64_t i = 0; i < t.queries(); ++i) {
      if (next.sum[i] == 0.0f) continue;
      const float peak = std::max(state.peak[i], next.peak[i]);
      const float keep = std::exp(state.peak[i] - peak), take = std::exp(next.peak[i] - peak);
      state.peak[i] = peak;
      state.sum[i] = state.sum[i] * keep + next.sum[i] * take;
      float* out = state.out + i * padded_dim_;
      const float* add = next.out + i * padded_dim_;
      for (int64_t d = 0; d < args_.pages.layout.head_dim; ++d)
        out[d] = out[d] * keep + add[d] * take;
    }
  }

  void finish(const Tile& t, const Partial& state) const {
    for (int64_t i = 0; i < t.queries(); ++i) {
      const float* from = state.out + i * padded_dim_;
      float* to = args_.out.row(t.first_row + i / t.heads) +
                  (t.first_head + i % t.heads) * args_.pages.layout.head_dim;
      const float inverse = 1.0f / state.sum[i];
      for (int64_t d = 0; d < args_.pages.layout.head_dim; ++d) to[d] = from[d] * inverse;
    }
  }

 private:
  PanelDot dot() const {
    return args_.pages.layout.dtype == DType::kFloat32 ? kernels_.dot_f32 : kernels_.dot_bf16_exact;
  }

  // The halves of k inputs of each query, where the kernel takes halves.
  void split(const Tile& t, int64_t k, Inputs& inputs) const {
    if (!split_) return;
    for (int64_t i = 0; i < t.queries(); ++i)
      kernels_.split_row(inputs.rows[i], k, inputs.high + i * kSplitStride,
                         inputs.low + i * kSplitStride);
  }

  // out[i][panel * 16 + lane] (rows out_stride apart) = x[i] . panel; split, all rows are written.
  void dot_panels(const Inputs& x, int64_t queries, int64_t k, const uint8_t* panels, size_t stride,
                  int64_t num_panels, float* out, int64_t out_stride) const {
    if (split_) {
      kernels_.split_dot(x.high, x.low, kSplitStride, k, {panels, stride, kStep},
                         static_cast<int>(num_panels), out, out_stride);
      return;
    }
    alignas(64) float tile[kMaxTile];
    for (int64_t p = 0; p < num_panels;) {
      const int count = panels_at_once(kernels_, queries, num_panels - p);
      const int64_t step = max_tile_rows(kernels_, count);
      for (int64_t m = 0; m < queries; m += step) {
        const int rows = static_cast<int>(std::min(step, queries - m));
        dot()(x.rows + m, rows, k, {panels + p * stride, stride, kStep}, count, tile);
        for (int i = 0; i < rows; ++i)
          std::copy_n(tile + i * count * kPanel, count * kPanel,
                      out + (m + i) * out_stride + p * kPanel);
      }
      p += count;
    }
  }

  const AttentionArgs& args_;
  const Kernels& kernels_;
  int64_t group_;
  int64_t padded_dim_;
  bool split_;
  int64_t heads_per_tile_;
  int64_t rows_per_tile_;
  int64_t tiles_per_kv_head_;
};

// Few tiles: pages of all tiles go to the pool side by side, then each tile merges its own in
// order.
void split_over_pages(const Attention& attention, const AttentionArgs& args, const Context& context,
                      int64_t tiles) {
  struct Unit {
    Tile tile;
    int64_t page;
  };
  Unit units[kMaxSplitUnits];
  int64_t count = 0;
  const int64_t per_row = attention.tiles_per_row_block();
  for (int64_t i = 0; i < tiles; ++i) {
    const Tile t = attention.tile(i / per_row, 1, i % per_row);
    for (int64_t p = attention.first_page(t); p <= attention.last_page(t); ++p)
      units[count++] = {t, p};
  }
  const auto partial = [&](int64_t unit) {
    return attention.partial_at(args.scratch + unit * attention.partial_floats());
  };
  context.pool.run(count, 2, [&](int64_t begin, int64_t end) {
    Inputs queries;
    for (int64_t u = begin; u < end; ++u) {
      attention.find_queries(units[u].tile, queries);
      attention.page(units[u].tile, queries, units[u].page, partial(u));
    }
  });
  for (int64_t u = 0; u < count;) {
    const Tile t = units[u].tile;
    const Partial state = partial(u++);
    for (int64_t p = attention.first_page(t) + 1; p <= attention.last_page(t); ++p)
      attention.merge(t, partial(u++), state);
    attention.finish(t, state);
  }
}

}  // namespace

size_t attention_scratch_floats(int64_t head_dim) {
  const auto padded = static_cast<size_t>((head_dim + kPadDim - 1) / kPadDim * kPadDim);
  return kMaxSplitUnits * kMostQueries * (padded + 2);
}

void attention(const AttentionArgs& args, const Context& context) {
  const Attention attention(args, context);
  const int64_t rows = args.q.count;
  const int64_t per_row = attention.tiles_per_row_block();
  int64_t pages = 0;
  for (int64_t i = 0; i < rows && pages <= kMaxSplitUnits; ++i)
    pages += per_row * (args.position(i) / kPageTokens + 1);
  if (rows <= 8 && pages <= kMaxSplitUnits) {
    split_over_pages(attention, args, context, rows * per_row);
    return;
  }
  // Blocks of rows that share a sequence and do not outgrow a tile.
  const auto block_end = [&](int64_t row) {
    int64_t end = row + 1;
    while (end < rows && end - row < attention.rows_per_tile() &&
           args.sequence(end) == args.sequence(row))
      ++end;
    return end;
  };
  int64_t blocks = 0;
  for (int64_t row = 0; row < rows; row = block_end(row)) ++blocks;
  // Later rows see more keys: small chunks even out.
  context.pool.run(blocks, 16, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[2 * kMostQueries * (kMaxHeadDim + 2)];
    Inputs queries;
    const Partial state = attention.partial_at(buffer);
    const Partial next = attention.partial_at(buffer + attention.partial_floats());
    int64_t row = 0;
    for (int64_t b = 0; b < begin; ++b) row = block_end(row);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t stop = block_end(row);
      for (int64_t which = 0; which < per_row; ++which) {
        const Tile t = attention.tile(row, stop - row, which);
        attention.find_queries(t, queries);
        const int64_t first = attention.first_page(t);
        attention.page(t, queries, first, state);
        for (int64_t p = first + 1; p <= attention.last_page(t); ++p) {
          attention.page(t, queries, p, next);
          attention.merge(t, next, state);
        }
        attention.finish(t, state);
      }
      row = stop;
    }
  });
}

}  // namespace flexidepth::cpu
