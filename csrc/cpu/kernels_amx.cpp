// The kernels for AMX, whose unit multiplies a tile of 16 rows x 32 inputs by one of 32 inputs x 16
// outputs. The second is a panel's 16 following steps as they lie in memory; the first is made once
// for all panels (tiles.h). Activations are rounded to bfloat16 where they meet bfloat16 weights,
// as with AVX512-BF16. A single row takes the same path, so that its bits do not depend on its
// company; the unit waits for memory then.
#include <cstring>

#include "cpu/kernels_impl.h"
#include "cpu/round_pairs.h"

namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileInputs = flexidepth::cpu::kRoundedInputs;
constexpr int64_t kTileSteps = kTileInputs / 2;  // steps of a panel
constexpr int64_t kTileSum = 1024;               // inputs summed in a tile before it is added up

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Loaded before each product: other libraries on this thread have shapes of their own; and tiles in
// use slow the switch to other threads, so they are released behind it.
const TileShapes& shapes() {
  static const TileShapes same;
  return same;
}

// Tiles 0 to 3 hold sums, of kTiles x kPanels tiles that share what is loaded: 4 and 5 inputs, 6
// and 7 weights. A tile holds sixteen rows; one of them takes up to four panels, two take two, the
// second with the sums 2 and 3.
template <int kTiles, int kPanels>
void zero_sums() {
  _tile_zero(0);
  if constexpr (kPanels > 1) _tile_zero(1);
  if constexpr (kTiles > 1 || kPanels > 2) _tile_zero(2);
  if constexpr (kTiles * kPanels > 3) _tile_zero(3);
}

template <int kTiles, int kPanels>
void multiply(const uint8_t* w, size_t stride, size_t step) {
  _tile_loadd(6, w, step);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTiles > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kPanels > 1) {
    _tile_loadd(7, w + stride, step);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles > 1) _tile_dpbf16ps(3, 5, 7);
  }
  if constexpr (kPanels > 2) {
    _tile_loadd(6, w + 2 * stride, step);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (kPanels > 3) {
    _tile_loadd(7, w + 3 * stride, step);
    _tile_dpbf16ps(3, 4, 7);
  }
}

// The sums of a tile of rows behind each other, `row` floats apart.
template <int kTiles, int kPanels>
void store_sums(float* to, int64_t row) {
  const auto bytes = static_cast<size_t>(row) * sizeof(float);
  _tile_stored(0, to, bytes);
  if constexpr (kTiles > 1) _tile_stored(2, to + kTileRows * row, bytes);
  if constexpr (kPanels > 1) {
    _tile_stored(1, to + kPanel, bytes);
    if constexpr (kTiles > 1) _tile_stored(3, to + kTileRows * row + kPanel, bytes);
  }
  if constexpr (kPanels > 2) _tile_stored(2, to + 2 * kPanel, bytes);
  if constexpr (kPanels > 3) _tile_stored(3, to + 3 * kPanel, bytes);
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

// Of kTiles x 16 rows and kPanels panels; a row of the output is `row` floats long.
template <int kTiles, int kPanels>
void rounded_tile(const uint32_t* pairs, int64_t stride, int64_t k, const Panels& w, float* tile,
                  int64_t row) {
  constexpr int kRows = kTiles * kTileRows, kWidth = kPanels * kPanel;
  const auto row_bytes = static_cast<size_t>(stride) * sizeof(uint32_t);
  alignas(64) float more[kRows * kWidth];
  alignas(64) uint8_t tail[kPanels * kTileSteps * flexidepth::cpu::kStep];
  for (int64_t i = 0; i < k;) {
    const bool first = i == 0;
    const int64_t end = k - i < kTileSum ? k : i + kTileSum;
    zero_sums<kTiles, kPanels>();
    for (; i < end; i += kTileInputs) {
      _tile_loadd(4, pairs + i / 2, row_bytes);
      if constexpr (kTiles > 1) _tile_loadd(5, pairs + kTileRows * stride + i / 2, row_bytes);
      if (k - i >= kTileInputs) {
        multiply<kTiles, kPanels>(w.data + static_cast<size_t>(i / 2) * w.step, w.stride, w.step);
      } else {
        copy_tail<kPanels>(w, i, k, tail);
        multiply<kTiles, kPanels>(tail, kTileSteps * flexidepth::cpu::kStep,
                                  flexidepth::cpu::kStep);
      }
    }
    if (first) {
      store_sums<kTiles, kPanels>(tile, row);
      continue;
    }
    store_sums<kTiles, kPanels>(more, kWidth);
    for (int m = 0; m < kRows; ++m)
      for (int j = 0; j < kWidth; j += kLanes)
        store(tile + m * row + j, add(load(tile + m * row + j), load(more + m * kWidth + j)));
  }
}

void rounded_dot(const uint32_t* pairs, int64_t stride, int64_t k, const Panels& w, int rows,
                 int panels, float* tile) {
  using Tile = void (*)(const uint32_t*, int64_t, int64_t, const Panels&, float*, int64_t);
  constexpr Tile one[] = {rounded_tile<1, 1>, rounded_tile<1, 2>, rounded_tile<1, 3>,
                          rounded_tile<1, 4>};
  constexpr Tile two[] = {rounded_tile<2, 1>, rounded_tile<2, 2>};
  _tile_loadconfig(&shapes());
  if (rows <= kTileRows) {
    one[panels - 1](pairs, stride, k, w, tile, panels * kPanel);
  } else {
    for (int p = 0; p < panels; p += 2) {
      const Panels pair{w.data + static_cast<size_t>(p) * w.stride, w.stride, w.step};
      two[panels - p > 1](pairs, stride, k, pair, tile + p * kPanel, panels * kPanel);
    }
  }
  _tile_release();
}

// As round_to_pairs, and into `low` what that leaves of x, rounded likewise.
void split_to_pairs(const float* x, int64_t n, uint32_t* high, uint32_t* low) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 first = _mm512_loadu_ps(x + i), second = _mm512_loadu_ps(x + i + 16);
    const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const auto exact = [](__m256i half) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    const __m512 left_first = _mm512_sub_ps(first, exact(_mm512_castsi512_si256(rounded)));
    const __m512 left_second = _mm512_sub_ps(second, exact(_mm512_extracti64x4_epi64(rounded, 1)));
    _mm512_storeu_si512(high + i / 2, rounded);
    _mm512_storeu_si512(low + i / 2, (__m512i)_mm512_cvtne2ps_pbh(left_second, left_first));
  }
  for (; i < n; i += 2) {
    uint32_t rounded[2] = {}, left[2] = {};
    for (int64_t j = i; j < n && j < i + 2; ++j) {
      const uint16_t bits = flexidepth::float_to_bf16(x[j]);
      rounded[j - i] = bits;
      left[j - i] = flexidepth::float_to_bf16(x[j] - flexidepth::bf16_to_float(bits));
    }
    high[i / 2] = rounded[0] | (rounded[1] << 16);
    low[i / 2] = left[0] | (left[1] << 16);
  }
}

// Zeros behind k, up to whole tiles.
void pad(int64_t k, uint32_t* pairs) {
  const int64_t padded = (k + kTileInputs - 1) / kTileInputs * kTileInputs;
  for (int64_t i = (k + 1) / 2; i < padded / 2; ++i) pairs[i] = 0;
}

void round_row(const float* x, int64_t k, uint32_t* pairs) {
  round_to_pairs(x, k, pairs);
  pad(k, pairs);
}

void split_row(const float* x, int64_t k, uint32_t* high, uint32_t* low) {
  split_to_pairs(x, k, high, low);
  pad(k, high);
  pad(k, low);
}

// Sums 0 to 3 of as many panels; 4 holds the high halves, 5 the low ones.
template <int kPanels>
void multiply_split(const uint8_t* w, size_t stride, size_t step) {
  _tile_loadd(6, w, step);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(0, 5, 6);
  if constexpr (kPanels > 1) {
    _tile_loadd(7, w + stride, step);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
  }
  if constexpr (kPanels > 2) {
    _tile_loadd(6, w + 2 * stride, step);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  }
  if constexpr (kPanels > 3) {
    _tile_loadd(7, w + 3 * stride, step);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <int kPanels>
void split_tile(const uint32_t* high, const uint32_t* low, int64_t stride, int64_t k,
                const Panels& w, float* out, int64_t out_stride) {
  const auto row_bytes = static_cast<size_t>(stride) * sizeof(uint32_t);
  alignas(64) uint8_t tail[kPanels * kTileSteps * flexidepth::cpu::kStep];
  zero_sums<1, kPanels>();
  for (int64_t i = 0; i < k; i += kTileInputs) {
    _tile_loadd(4, high + i / 2, row_bytes);
    _tile_loadd(5, low + i / 2, row_bytes);
    if (k - i >= kTileInputs) {
      multiply_split<kPanels>(w.data + static_cast<size_t>(i / 2) * w.step, w.stride, w.step);
    } else {
      copy_tail<kPanels>(w, i, k, tail);
      multiply_split<kPanels>(tail, kTileSteps * flexidepth::cpu::kStep, flexidepth::cpu::kStep);
    }
  }
  store_sums<1, kPanels>(out, out_stride);
}

void split_dot(const uint32_t* high, const uint32_t* low, int64_t stride, int64_t k,
               const Panels& w, int panels, float* out, int64_t out_stride) {
  using Tile =
      void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, const Panels&, float*, int64_t);
  constexpr Tile tiles[] = {split_tile<1>, split_tile<2>, split_tile<3>, split_tile<4>};
  _tile_loadconfig(&shapes());
  for (int p = 0; p < panels; p += flexidepth::cpu::kGroup) {
    const int count = panels - p < flexidepth::cpu::kGroup ? panels - p : flexidepth::cpu::kGroup;
    const Panels group{w.data + static_cast<size_t>(p) * w.stride, w.stride, w.step};
    tiles[count - 1](high, low, stride, k, group, out + p * kPanel, out_stride);
  }
  _tile_release();
}

}  // namespace

namespace flexidepth::cpu {

const Kernels* kernels_amx() {
  static const Kernels table = [] {
    Kernels made = make_kernels("amx", dot_bf16);
    made.round_row = round_row;
    made.rounded_dot = rounded_dot;
    made.split_row = split_row;
    made.split_dot = split_dot;
    return made;
  }();
  return &table;
}

}  // namespace flexidepth::cpu
