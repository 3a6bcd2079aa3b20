// Cutting rows x panels into tiles that the PanelDot kernels take.
#pragma once

#include <algorithm>

#include "cpu/context.h"
#include "cpu/rounded_rows.h"
#include "ops/rows.h"

namespace flexidepth::cpu {

// Rows a block of the many-rows loop holds: its inputs stay in L2 while a group of panels passes,
// or, rounded, while all of them do.
constexpr int64_t kRowBlock = 96;
constexpr int64_t kRoundedRowBlock = 512;
constexpr int kMostUnits = 64;  // that a thread claims one by one

inline int64_t panels_in(const PackedMatrix& w) { return (w.n + kPanel - 1) / kPanel; }

inline int max_tile_rows(const Kernels& kernels, int panels) {
  return panels == 1   ? kernels.max_tile_rows_1
         : panels == 2 ? kernels.max_tile_rows_2
                       : kernels.max_tile_rows_4;
}

// How many panels (1 to 4) out of `left` to take at once for this number of rows: as many as leave
// registers for all rows, and of a block of rows so many that its tiles hold four rows or more.
// Nine are taken as 3 + 3 + 3: a last one alone would be read at the speed of a single stream.
inline int panels_at_once(const Kernels& kernels, int64_t rows, int64_t left) {
  const auto fits = [&](int max_rows) { return max_rows >= 4 || rows <= max_rows; };
  if (left >= 3 && fits(kernels.max_tile_rows_4)) {
    const int64_t turns = (left + kGroup - 1) / kGroup;
    return static_cast<int>((left + turns - 1) / turns);
  }
  return left >= 2 && fits(kernels.max_tile_rows_2) ? 2 : 1;
}

// The panels of a weight matrix from `panel` on.
inline Panels weight_panels(const PackedMatrix& w, int64_t panel) {
  const size_t stride = panel_bytes(w.dtype, w.k);
  return {w.data + static_cast<size_t>(panel) * stride, stride, kStep};
}

inline PanelDot weight_dot(const PackedMatrix& w, const Kernels& kernels) {
  return w.dtype == DType::kFloat32 ? kernels.dot_f32 : kernels.dot_bf16;
}

// visit(panel, count) over panels [begin, end), as many at a time as the kernels take.
template <class Visit>
void for_each_panel_group(const Kernels& kernels, int64_t rows, int64_t begin, int64_t end,
                          const Visit& visit) {
  for (int64_t p = begin; p < end;) {
    const int count = panels_at_once(kernels, rows, end - p);
    visit(p, count);
    p += count;
  }
}

inline bool takes_rounded(const PackedMatrix& w, const Kernels& kernels) {
  return w.dtype == DType::kBFloat16 && kernels.rounded_dot != nullptr;
}

// consume(first_row, rows, tile) for each tile of x[row_begin, row_end) with panels
// [panel, panel + count) of w; tile is [rows][count * 16].
template <class Consume>
void for_each_tile(const Kernels& kernels, const Rows& x, int64_t row_begin, int64_t row_end,
                   const PackedMatrix& w, int64_t panel, int count, const Consume& consume) {
  alignas(64) float tile[kMaxTile];
  if (takes_rounded(w, kernels)) {
    const RoundedRows& rounded = RoundedRows::of(kernels.round_row, x, row_begin, row_end, w.k);
    for (int64_t m = row_begin; m < row_end; m += kRoundedRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRoundedRows, row_end - m));
      kernels.rounded_dot(rounded.row(m), rounded.stride(), w.k, weight_panels(w, panel), rows,
                          count, tile);
      consume(m, rows, tile);
    }
    return;
  }
  const PanelDot dot = weight_dot(w, kernels);
  const Panels panels = weight_panels(w, panel);
  const int step = max_tile_rows(kernels, count);
  for (int64_t m = row_begin; m < row_end; m += step) {
    const int rows = static_cast<int>(std::min<int64_t>(step, row_end - m));
    const float* pointers[kMaxTileRows];
    for (int i = 0; i < rows; ++i) pointers[i] = x.row(m + i);
    dot(pointers, rows, w.k, panels, count, tile);
    consume(m, rows, tile);
  }
}

// visit(matrix, begin, end, row_begin, row_end) over all panels of all matrices x all rows, on the
// pool. Few rows: each thread walks a contiguous run of panels, weights stream by once. Many rows:
// blocks of rows against one group of panels. Where rows are rounded a thread takes all groups of a
// block, so that it alone rounds these rows; threads that blocks do not suffice for share them.
template <class Visit>
void for_each_panel_block(const Context& context, int64_t rows, const int64_t* panels, int matrices,
                          const Visit& visit) {
  int64_t total = 0, groups = 0;
  for (int i = 0; i < matrices; ++i) {
    total += panels[i];
    groups += (panels[i] + kGroup - 1) / kGroup;
  }
  const uint64_t call = RoundedRows::new_call();
  if (rows <= context.kernels.max_tile_rows_2) {
    context.pool.run(total, 2, [&](int64_t begin, int64_t end) {
      RoundedRows::begin(call);
      for (int i = 0; i < matrices && begin < end; ++i) {
        if (begin < panels[i]) visit(i, begin, std::min(end, panels[i]), int64_t{0}, rows);
        begin = std::max<int64_t>(0, begin - panels[i]);
        end -= panels[i];
      }
    });
    return;
  }
  const auto visit_group = [&](int64_t group, int64_t row_begin, int64_t row_end) {
    int i = 0;
    while (group >= (panels[i] + kGroup - 1) / kGroup) group -= (panels[i++] + kGroup - 1) / kGroup;
    const int64_t first = group * kGroup;
    visit(i, first, std::min(panels[i], first + kGroup), row_begin, row_end);
  };
  if (context.kernels.rounded_dot == nullptr) {
    const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
    context.pool.run(groups * blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t m = unit % blocks * kRowBlock;
        visit_group(unit / blocks, m, std::min(rows, m + kRowBlock));
      }
    });
    return;
  }
  const int64_t threads = context.pool.size();
  const int64_t tiles = (rows + kRoundedRows - 1) / kRoundedRows;
  const int64_t block = std::min(kRoundedRowBlock, (tiles + threads - 1) / threads * kRoundedRows);
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t shares = std::min(groups, (threads + blocks - 1) / blocks);
  context.pool.run(blocks * shares, kMostUnits, [&](int64_t begin, int64_t end) {
    RoundedRows::begin(call);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t m = unit / shares * block, share = unit % shares;
      for (int64_t g = groups * share / shares; g < groups * (share + 1) / shares; ++g)
        visit_group(g, m, std::min(rows, m + block));
    }
  });
}

}  // namespace flexidepth::cpu
