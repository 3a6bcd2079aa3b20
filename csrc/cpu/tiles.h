// Cutting rows x panels into tiles that the PanelDot kernels take.
#pragma once

#include <algorithm>

#include "cpu/context.h"
#include "ops/rows.h"

namespace flexidepth::cpu {

// Rows a block of the many-rows loop holds: the tile's inputs stay in L2 while its panels stay in
// L1.
constexpr int64_t kRowBlock = 96;

inline int max_tile_rows(const Kernels& kernels, int panels) {
  return panels == 1   ? kernels.max_tile_rows_1
         : panels == 2 ? kernels.max_tile_rows_2
                       : kernels.max_tile_rows_4;
}

// Largest panel group (4, 2, 1) out of `left` panels for this number of rows.
inline int panel_group(const Kernels& kernels, int64_t rows, int64_t left) {
  if (left >= 4 && rows <= kernels.max_tile_rows_4) return 4;
  return left >= 2 ? 2 : 1;
}

struct PanelMatrix {
  const uint8_t* data;
  size_t stride;  // bytes from panel to panel
  int64_t k;
  PanelDot dot;
};

inline PanelMatrix panels_of(const PackedMatrix& w, const Kernels& kernels) {
  return {w.data, panel_bytes(w.dtype, w.k), w.k,
          w.dtype == DType::kFloat32 ? kernels.dot_f32 : kernels.dot_bf16};
}

// consume(first_row, rows, tile) for each tile of x[row_begin, row_end) with panels [panel, panel +
// count); tile is [rows][count * 16].
template <class Consume>
void for_each_tile(const Kernels& kernels, const Rows& x, int64_t row_begin, int64_t row_end,
                   const PanelMatrix& matrix, int64_t panel, int count, const Consume& consume) {
  alignas(64) float tile[kMaxTile];
  const int step = max_tile_rows(kernels, count);
  for (int64_t m = row_begin; m < row_end; m += step) {
    const int rows = static_cast<int>(std::min<int64_t>(step, row_end - m));
    const float* pointers[kMaxTileRows];
    for (int i = 0; i < rows; ++i) pointers[i] = x.row(m + i);
    matrix.dot(pointers, rows, matrix.k, matrix.data + panel * matrix.stride, matrix.stride, count,
               tile);
    consume(m, rows, tile);
  }
}

// visit(panel, count, row_begin, row_end) over all panels x rows on the pool. Few rows: each thread
// walks a contiguous run of panels once, weights stream by. Many rows: blocks of rows against pairs
// of panels.
template <class Visit>
void for_each_panel_block(const Context& context, int64_t rows, int64_t panels,
                          const Visit& visit) {
  const Kernels& kernels = context.kernels;
  if (rows <= kernels.max_tile_rows_4) {
    context.pool.run(panels, 2, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end;) {
        const int count = panel_group(kernels, rows, end - p);
        visit(p, count, int64_t{0}, rows);
        p += count;
      }
    });
    return;
  }
  const int64_t groups = (panels + 1) / 2;
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  context.pool.run(groups * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t p = unit / blocks * 2, m = unit % blocks * kRowBlock;
      visit(p, static_cast<int>(std::min<int64_t>(2, panels - p)), m,
            std::min(rows, m + kRowBlock));
    }
  });
}

}  // namespace flexidepth::cpu
