#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/tiles.h"

namespace flexidepth::cpu {

namespace {

constexpr int64_t kPadDim = 16;
// Split the pages of a row over threads up to this many (tile, page) units; beyond, tiles are
// enough.
constexpr int64_t kMaxSplitUnits = 512;

// Queries that share a KV head and a sequence: some rows times the heads of the group, at most 12.
struct Tile {
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t kv_head = 0;
  int64_t first_head = 0;
  int64_t heads = 0;
  int64_t queries() const { return rows * heads; }
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
        padded_dim_(args.pages.layout.value_panels() * kPadDim) {
    heads_per_tile_ = std::min<int64_t>(group_, kMaxTileRows);
    rows_per_tile_ = std::max<int64_t>(1, kMaxTileRows / heads_per_tile_);
    tiles_per_kv_head_ = (group_ + heads_per_tile_ - 1) / heads_per_tile_;
  }

  int64_t tiles_per_row_block() const {
    return args_.pages.layout.num_kv_heads * tiles_per_kv_head_;
  }
  int64_t rows_per_tile() const { return rows_per_tile_; }
  int64_t partial_floats() const { return kMaxTileRows * (padded_dim_ + 2); }

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
    return {scratch, scratch + kMaxTileRows, scratch + 2 * kMaxTileRows};
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

  // One page into a fresh partial. A query that sees nothing of the page gets peak -inf, sum 0.
  void page(const Tile& t, int64_t page, const Partial& result) const {
    alignas(64) float scores[kMaxTileRows * kPageTokens];
    const uint8_t* base =
        args_.pages.tables[args_.sequence(t.first_row)][page] + args_.pages.layer_offset;
    const int64_t page_start = page * kPageTokens;
    const int64_t tokens =
        std::min(kPageTokens, args_.position(t.first_row + t.rows - 1) + 1 - page_start);
    dot_keys(t, base, tokens, scores);
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
    weigh_values(t, base, tokens, scores, result.out);
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

  void clear(const Tile& t, const Partial& state) const {
    for (int64_t i = 0; i < t.queries(); ++i) {
      state.peak[i] = -std::numeric_limits<float>::infinity();
      state.sum[i] = 0.0f;
      std::fill_n(state.out + i * padded_dim_, padded_dim_, 0.0f);
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

  // out[i][panel * 16 + lane] (rows out_stride apart) = x[i] . panel; one or two panels at a time.
  void dot_panels(const float* const* x, int64_t queries, int64_t k, const uint8_t* panels,
                  size_t stride, int64_t num_panels, float* out, int64_t out_stride) const {
    alignas(64) float tile[kMaxTile];
    for (int64_t p = 0; p < num_panels;) {
      const int count = panels_at_once(kernels_, queries, num_panels - p);
      const int64_t step = max_tile_rows(kernels_, count);
      for (int64_t m = 0; m < queries; m += step) {
        const int rows = static_cast<int>(std::min(step, queries - m));
        dot()(x + m, rows, k, {panels + p * stride, stride, kStep}, count, tile);
        for (int i = 0; i < rows; ++i)
          std::copy_n(tile + i * count * kPanel, count * kPanel,
                      out + (m + i) * out_stride + p * kPanel);
      }
      p += count;
    }
  }

  void dot_keys(const Tile& t, const uint8_t* base, int64_t tokens, float* scores) const {
    const float* q[kMaxTileRows];
    for (int64_t i = 0; i < t.queries(); ++i)
      q[i] = args_.q.row(t.first_row + i / t.heads) +
             (t.first_head + i % t.heads) * args_.pages.layout.head_dim;
    dot_panels(q, t.queries(), args_.pages.layout.head_dim,
               base + args_.pages.layout.key_offset(t.kv_head, 0),
               args_.pages.layout.key_panel_bytes(), (tokens + kPanel - 1) / kPanel, scores,
               kPageTokens);
  }

  void weigh_values(const Tile& t, const uint8_t* base, int64_t tokens, const float* scores,
                    float* out) const {
    const float* weights[kMaxTileRows];
    for (int64_t i = 0; i < t.queries(); ++i) weights[i] = scores + i * kPageTokens;
    dot_panels(weights, t.queries(), tokens, base + args_.pages.layout.value_offset(t.kv_head, 0),
               args_.pages.layout.value_panel_bytes(), args_.pages.layout.value_panels(), out,
               padded_dim_);
  }

  const AttentionArgs& args_;
  const Kernels& kernels_;
  int64_t group_;
  int64_t padded_dim_;
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
    return attention.partial_at(args.scratch + (unit + 1) * attention.partial_floats());
  };
  context.pool.run(count, 2, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) attention.page(units[u].tile, units[u].page, partial(u));
  });
  const Partial state = attention.partial_at(args.scratch);
  for (int64_t u = 0; u < count;) {
    const Tile t = units[u].tile;
    attention.clear(t, state);
    for (int64_t p = attention.first_page(t); p <= attention.last_page(t); ++p)
      attention.merge(t, partial(u++), state);
    attention.finish(t, state);
  }
}

}  // namespace

size_t attention_scratch_floats(int64_t head_dim) {
  const auto padded = static_cast<size_t>((head_dim + kPadDim - 1) / kPadDim * kPadDim);
  return (kMaxSplitUnits + 1) * kMaxTileRows * (padded + 2);  // one state, one partial a unit
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
    alignas(64) float buffer[2 * kMaxTileRows * (kMaxHeadDim + 2)];
    const Partial state = attention.partial_at(buffer);
    const Partial next = attention.partial_at(buffer + attention.partial_floats());
    int64_t row = 0;
    for (int64_t b = 0; b < begin; ++b) row = block_end(row);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t stop = block_end(row);
      for (int64_t which = 0; which < per_row; ++which) {
        const Tile t = attention.tile(row, stop - row, which);
        attention.clear(t, state);
        for (int64_t p = attention.first_page(t); p <= attention.last_page(t); ++p) {
          attention.page(t, p, next);
          attention.merge(t, next, state);
        }
        attention.finish(t, state);
      }
      row = stop;
    }
  });
}

}  // namespace flexidepth::cpu
