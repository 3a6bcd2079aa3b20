// The kernels for AVX-512 with the bfloat16 dot product: activations are rounded to bfloat16 before
// they meet bfloat16 weights, as in torch and llama.cpp; everything between (norms, attention,
// gates, residual stream, sums) stays float32. Prompts take two thirds of the time, decoding the
// same.
#include "cpu/kernels_impl.h"
#include "cpu/round_pairs.h"

namespace {

constexpr int kMaxRows = flexidepth::cpu::kMaxTileRows;

inline __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

template <int kRows, int kPanels>
void dot_tile_pairs(const float* const* x, int64_t k, const Panels& w, float* tile) {
  uint32_t pairs[kRows][kSumBlock / 2];
  int64_t i = 0;
  do {
    const int64_t end = k - i < kSumBlock ? k : i + kSumBlock;
    const bool first = i == 0;
    for (int m = 0; m < kRows; ++m) round_to_pairs(x[m] + i, end - i, pairs[m]);
    Accumulators<kRows, kPanels> sums;
    sums.clear();
    const int64_t count = (end - i + 1) / 2;
    const __mmask32 even_only = 0x55555555u;
    for (int64_t j = 0; j < count; ++j) {
      const bool lone = i + 2 * j + 1 >= end;
      __m512bh wv[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const uint8_t* source = w.data + p * w.stride + (i / 2 + j) * w.step;
        const __m512i raw = _mm512_loadu_si512(source);
        wv[p] = as_bf16(lone ? _mm512_maskz_mov_epi16(even_only, raw) : raw);
      }
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        const __m512bh xm = as_bf16(_mm512_set1_epi32(static_cast<int>(pairs[m][j])));
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p)
          sums.a[m][p].v = _mm512_dpbf16_ps(sums.a[m][p].v, xm, wv[p]);
      }
    }
    sums.flush(tile, first);
    i = end;
  } while (i < k);
}

static_assert(kRows1 <= kMaxRows && kRows2 <= kMaxRows, "tile rows exceed the callers' buffers");

FD_DEFINE_DOT(dot_bf16_rounded, dot_tile_pairs)

}  // namespace

namespace flexidepth::cpu {

const Kernels* kernels_avx512bf16() {
  static const Kernels table = make_kernels("avx512bf16", dot_bf16_rounded);
  return &table;
}

}  // namespace flexidepth::cpu
