// Bodies of the kernels in kernels.h, written once over simd.h and compiled once per instruction
// set. Included by kernels_*.cpp only; everything is in an unnamed namespace (see simd.h).
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace {

using flexidepth::cpu::kPanel;
using flexidepth::cpu::Panels;

constexpr int64_t kSumBlock = 256;  // inputs per partial sum, see PanelDot

template <int kRows, int kPanels>
struct Accumulators {
  Vec a[kRows][kPanels];

  void clear() {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) a[m][p] = set1(0.0f);
  }

  void step(const float* const* x, int64_t i, const Vec* w) {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const Vec xm = set1(x[m][i]);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) a[m][p] = fma(xm, w[p], a[m][p]);
    }
  }

  void flush(float* tile, bool first) {
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        float* out = tile + (m * kPanels + p) * kPanel;
        store(out, first ? a[m][p] : add(load(out), a[m][p]));
      }
  }
};

template <int kRows, int kPanels>
void dot_tile_f32(const float* const* x_in, int64_t k, const Panels& w, float* tile) {
  const float* x[kRows];
  for (int m = 0; m < kRows; ++m) x[m] = x_in[m];
  const uint8_t* source = w.data;
  Accumulators<kRows, kPanels> sums;
  int64_t i = 0;
  do {
    const int64_t end = k - i < kSumBlock ? k : i + kSumBlock;
    const bool first = i == 0;
    sums.clear();
    for (; i < end; ++i, source += w.step) {
      Vec wv[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        wv[p] = load(reinterpret_cast<const float*>(source + p * w.stride));
      }
      sums.step(x, i, wv);
    }
    sums.flush(tile, first);
  } while (i < k);
}

template <int kRows, int kPanels>
void dot_tile_bf16(const float* const* x_in, int64_t k, const Panels& w, float* tile) {
  const float* x[kRows];
  for (int m = 0; m < kRows; ++m) x[m] = x_in[m];
  const uint8_t* source = w.data;
  Accumulators<kRows, kPanels> sums;
  int64_t i = 0;
  do {
    const int64_t end = k - i < kSumBlock ? k : i + kSumBlock;
    const bool first = i == 0;
    sums.clear();
    for (; i < end; i += 2, source += w.step) {
      Vec wv[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p)
        wv[p] = load_bf16_even(reinterpret_cast<const uint16_t*>(source + p * w.stride));
      sums.step(x, i, wv);
      if (i + 1 == end) continue;  // the last input of an odd k has no partner
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p)
        wv[p] = load_bf16_odd(reinterpret_cast<const uint16_t*>(source + p * w.stride));
      sums.step(x, i + 1, wv);
    }
    if (i > end) i = end;
    sums.flush(tile, first);
  } while (i < k);
}

using DotTile = void (*)(const float* const*, int64_t, const Panels&, float*);

// Accumulators of rows x panels must fit the register file: 32 registers of 16 lanes, or 16 of 8.
#if defined(__AVX512F__)
constexpr int kRows1 = 12, kRows2 = 12, kRows4 = 6;
#elif defined(__AVX2__)
constexpr int kRows1 = 6, kRows2 = 3, kRows4 = 1;
#else
constexpr int kRows1 = 4, kRows2 = 2, kRows4 = 1;
#endif

#define FD_ROWS_TO_12(tile, panels)                                      \
  {tile<1, panels>, tile<2, panels>,  tile<3, panels>,  tile<4, panels>, \
   tile<5, panels>, tile<6, panels>,  tile<7, panels>,  tile<8, panels>, \
   tile<9, panels>, tile<10, panels>, tile<11, panels>, tile<12, panels>}
#define FD_ROWS_TO_6(tile, panels)                    \
  {tile<1, panels>, tile<2, panels>, tile<3, panels>, \
   tile<4, panels>, tile<5, panels>, tile<6, panels>}
#define FD_ROWS_TO_4(tile, panels) \
  {tile<1, panels>, tile<2, panels>, tile<3, panels>, tile<4, panels>}
#define FD_ROWS_TO_3(tile, panels) {tile<1, panels>, tile<2, panels>, tile<3, panels>}
#define FD_ROWS_TO_2(tile, panels) {tile<1, panels>, tile<2, panels>}
#define FD_ROWS_TO_1(tile, panels) {tile<1, panels>}

#if defined(__AVX512F__)
#define FD_DEFINE_DOT(name, tile)                        \
  constexpr DotTile name##_1[] = FD_ROWS_TO_12(tile, 1); \
  constexpr DotTile name##_2[] = FD_ROWS_TO_12(tile, 2); \
  constexpr DotTile name##_3[] = FD_ROWS_TO_6(tile, 3);  \
  constexpr DotTile name##_4[] = FD_ROWS_TO_6(tile, 4);  \
  FD_DEFINE_DOT_ENTRY(name)
#elif defined(__AVX2__)
#define FD_DEFINE_DOT(name, tile)                       \
  constexpr DotTile name##_1[] = FD_ROWS_TO_6(tile, 1); \
  constexpr DotTile name##_2[] = FD_ROWS_TO_3(tile, 2); \
  constexpr DotTile name##_3[] = FD_ROWS_TO_1(tile, 3); \
  constexpr DotTile name##_4[] = FD_ROWS_TO_1(tile, 4); \
  FD_DEFINE_DOT_ENTRY(name)
#else
#define FD_DEFINE_DOT(name, tile)                       \
  constexpr DotTile name##_1[] = FD_ROWS_TO_4(tile, 1); \
  constexpr DotTile name##_2[] = FD_ROWS_TO_2(tile, 2); \
  constexpr DotTile name##_3[] = FD_ROWS_TO_1(tile, 3); \
  constexpr DotTile name##_4[] = FD_ROWS_TO_1(tile, 4); \
  FD_DEFINE_DOT_ENTRY(name)
#endif

#define FD_DEFINE_DOT_ENTRY(name)                                                    \
  void name(const float* const* x, int rows, int64_t k, const Panels& w, int panels, \
            float* tile) {                                                           \
    const DotTile* const tables[] = {name##_1, name##_2, name##_3, name##_4};        \
    tables[panels - 1][rows - 1](x, k, w, tile);                                     \
  }

FD_DEFINE_DOT(dot_f32, dot_tile_f32)
FD_DEFINE_DOT(dot_bf16, dot_tile_bf16)

float sum_squares(const float* x, int64_t n) {
  Vec sum = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    sum = fma(v, v, sum);
  }
  float total = reduce_add(sum);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

float dot(const float* a, const float* b, int64_t n) {
  Vec sum = set1(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = fma(load(a + i), load(b + i), sum);
  float total = reduce_add(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

void scale_mul(const float* x, float scale, const float* weight, float* y, int64_t n) {
  const Vec s = set1(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, mul(mul(load(x + i), s), load(weight + i)));
  for (; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// Rows shorter than a vector go through a padded copy, so that every element sees the same
// arithmetic.
template <class Function>
inline void for_each_vec(int64_t n, Function function) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) function(i, kLanes);
  if (i < n) function(i, static_cast<int>(n - i));
}

inline Vec load_part(const float* p, int count) {
  if (count == kLanes) return load(p);
  float t[kLanes] = {};
  for (int i = 0; i < count; ++i) t[i] = p[i];
  return load(t);
}

inline void store_part(float* p, Vec a, int count) {
  if (count == kLanes) return store(p, a);
  float t[kLanes];
  store(t, a);
  for (int i = 0; i < count; ++i) p[i] = t[i];
}

inline Vec load_biased(const float* x, const float* bias, int64_t i, int count) {
  const Vec v = load_part(x + i, count);
  return bias == nullptr ? v : add(v, load_part(bias + i, count));
}

void store_row(const float* x, const float* bias, float* y, int n) {
  for_each_vec(
      n, [&](int64_t i, int count) { store_part(y + i, load_biased(x, bias, i, count), count); });
}

void accumulate_row(const float* x, const float* bias, float scale, float* y, int n) {
  const Vec s = set1(scale);
  for_each_vec(n, [&](int64_t i, int count) {
    store_part(y + i, fma(s, load_biased(x, bias, i, count), load_part(y + i, count)), count);
  });
}

// silu(g) = g / (1 + e^-g)
void silu_mul_row(const float* gate, const float* gate_bias, const float* up, const float* up_bias,
                  float* out, int n) {
  const Vec zero = set1(0.0f), one = set1(1.0f);
  for_each_vec(n, [&](int64_t i, int count) {
    const Vec g = load_biased(gate, gate_bias, i, count);
    const Vec silu = div(g, add(one, exp(sub(zero, g))));
    store_part(out + i, mul(silu, load_biased(up, up_bias, i, count)), count);
  });
}

// tanh(x) = 1 - 2 / (e^2x + 1): absolute error below 2e-7
void tanh_row(const float* x, float* y, int64_t n) {
  const Vec one = set1(1.0f), two = set1(2.0f);
  for_each_vec(n, [&](int64_t i, int count) {
    const Vec e = exp(mul(two, load_part(x + i, count)));
    store_part(y + i, sub(one, div(two, add(e, one))), count);
  });
}

float scale_max(float* s, float scale, int64_t n) {
  const Vec factor = set1(scale);
  const Vec lowest = set1(-3.402823466e+38f);
  Vec peak = lowest;
  for_each_vec(n, [&](int64_t i, int count) {
    const Vec v = mul(load_part(s + i, count), factor);
    store_part(s + i, v, count);
    peak = max(peak, select_first(count, v, lowest));
  });
  return reduce_max(peak);
}

float exp_sum(float* s, float peak, int64_t n) {
  const Vec top = set1(peak), zero = set1(0.0f);
  Vec sum = zero;
  for_each_vec(n, [&](int64_t i, int count) {
    const Vec e = exp(sub(load_part(s + i, count), top));
    store_part(s + i, e, count);
    sum = add(sum, select_first(count, e, zero));
  });
  return reduce_add(sum);
}

flexidepth::cpu::Kernels make_kernels(const char* name, flexidepth::cpu::PanelDot bf16) {
  return {name,     dot_f32,     bf16,      dot_bf16,  kRows1,         kRows2,
          kRows4,   sum_squares, scale_mul, store_row, accumulate_row, silu_mul_row,
          tanh_row, dot,         scale_max, exp_sum};
}

}  // namespace
