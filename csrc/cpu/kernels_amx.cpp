// The kernels for AMX, whose unit multiplies a tile of 16 rows x 32 inputs by one of 32 inputs x 16
// outputs. The second is a panel's 16 following steps as they lie in memory; the first is made once
// for all panels (tiles.h). Activations are rounded to bfloat16 where they meet bfloat16 weights,
// as with AVX512-BF16. A single row takes the same path, so that its bits do not depend on its
// company; the unit waits for memory then.
#include <cstring>

#include "cpu/kernels_impl.h"
#include "cpu/round_pairs.h"

namespace {

constexpr int kTileRows = flexidepth::cpu::kRoundedRows;
constexpr int64_t kTileInputs = flexidepth::cpu::kRoundedInputs;
constexpr int64_t kTileSteps = kTileInputs / 2;  // steps of a panel
constexpr int64_t kTileSum = 1024;               // inputs summed in a tile before it is added up

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 hold sums, 4 the inputs, 5 and 6 weights.
template <int kPanels>
void zero_sums() {
  _tile_zero(0);
  if constexpr (kPanels > 1) _tile_zero(1);
  if constexpr (kPanels > 2) _tile_zero(2);
  if constexpr (kPanels > 3) _tile_zero(3);
}

template <int kPanels>
void multiply(const uint8_t* w, size_t stride, size_t step) {
  _tile_loadd(5, w, step);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kPanels > 1) {
    _tile_loadd(6, w + stride, step);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kPanels > 2) {
    _tile_loadd(5, w + 2 * stride, step);
    _tile_dpbf16ps(2, 4, 5);
  }
  if constexpr (kPanels > 3) {
    _tile_loadd(6, w + 3 * stride, step);
    _tile_dpbf16ps(3, 4, 6);
  }
}

template <int kPanels>
void store_sums(float* to) {
  constexpr size_t kRow = kPanels * kPanel * sizeof(float);
  _tile_stored(0, to, kRow);
  if constexpr (kPanels > 1) _tile_stored(1, to + kPanel, kRow);
  if constexpr (kPanels > 2) _tile_stored(2, to + 2 * kPanel, kRow);
  if constexpr (kPanels > 3) _tile_stored(3, to + 3 * kPanel, kRow);
}

// The last steps of the panels, fewer than a tile holds, in tiles of their own with zeros behind;
// what stands beside the last input of an odd k may be anything.
template <int kPanels>
void copy_tail(const Panels& w, int64_t begin, int64_t k, uint8_t* to) {
  std::memset(to, 0, kPanels * kTileSteps * flexidepth::cpu::kStep);
  for (int p = 0; p < kPanels; ++p)
    for (int64_t i = begin; i < k; i += 2) {
      const __mmask32 lanes = i + 1 < k ? 0xffffffffu : 0x55555555u;
      const uint8_t* from = w.data + p * w.stride + static_cast<size_t>(i / 2) * w.step;
      const auto at = static_cast<size_t>(p * kTileSteps + (i - begin) / 2);
      _mm512_store_si512(to + at * flexidepth::cpu::kStep, _mm512_maskz_loadu_epi16(lanes, from));
    }
}

template <int kPanels>
void rounded_tile(const uint32_t* pairs, int64_t stride, int64_t k, const Panels& w, float* tile) {
  constexpr int kFloats = kTileRows * kPanels * kPanel;
  const auto row_bytes = static_cast<size_t>(stride) * sizeof(uint32_t);
  alignas(64) float more[kFloats];
  alignas(64) uint8_t tail[kPanels * kTileSteps * flexidepth::cpu::kStep];
  for (int64_t i = 0; i < k;) {
    const bool first = i == 0;
    const int64_t end = k - i < kTileSum ? k : i + kTileSum;
    zero_sums<kPanels>();
    for (; i < end; i += kTileInputs) {
      _tile_loadd(4, pairs + i / 2, row_bytes);
      if (k - i >= kTileInputs) {
        multiply<kPanels>(w.data + static_cast<size_t>(i / 2) * w.step, w.stride, w.step);
      } else {
        copy_tail<kPanels>(w, i, k, tail);
        multiply<kPanels>(tail, kTileSteps * flexidepth::cpu::kStep, flexidepth::cpu::kStep);
      }
    }
    store_sums<kPanels>(first ? tile : more);
    if (!first)
      for (int j = 0; j < kFloats; j += kLanes)
        store(tile + j, add(load(tile + j), load(more + j)));
  }
}

void rounded_dot(const uint32_t* pairs, int64_t stride, int64_t k, const Panels& w, int panels,
                 float* tile) {
  using Tile = void (*)(const uint32_t*, int64_t, int64_t, const Panels&, float*);
  constexpr Tile tiles[] = {rounded_tile<1>, rounded_tile<2>, rounded_tile<3>, rounded_tile<4>};
  static const TileShapes shapes;
  // Other libraries on this thread have shapes of their own; and tiles in use slow the switch to
  // other threads.
  _tile_loadconfig(&shapes);
  tiles[panels - 1](pairs, stride, k, w, tile);
  _tile_release();
}

void round_row(const float* x, int64_t k, uint32_t* pairs) {
  round_to_pairs(x, k, pairs);
  const int64_t padded = (k + kTileInputs - 1) / kTileInputs * kTileInputs;
  for (int64_t i = (k + 1) / 2; i < padded / 2; ++i) pairs[i] = 0;
}

}  // namespace

namespace flexidepth::cpu {

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels made = make_kernels("amx", dot_bf16);
    made.round_row = round_row;
    made.rounded_dot = rounded_dot;
    return made;
  }();
  return &table;
}

}  // namespace flexidepth::cpu
