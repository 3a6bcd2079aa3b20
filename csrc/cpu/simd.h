// Sixteen float32 lanes as one value, on AVX-512, AVX2 or plain C++ (chosen by the flags of the
// including file). Lane arithmetic and the order of every reduction are the same on all of them, so
// that AVX2 and AVX-512 give the same bits; the plain path differs only in having no fused
// multiply-add.
//
// Include it only from kernels_*.cpp: everything here lives in an unnamed namespace, because code
// compiled for one instruction set must never be merged by the linker with code compiled for
// another.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
// GCC 12's own headers read the "undefined" operand of masked builtins; the warning lands on every
// caller.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec set1(float a) { return {_mm512_set1_ps(a)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// lane < limit ? a : b
inline Vec select_first(int limit, Vec a, Vec b) {
  const __mmask16 mask = limit >= kLanes ? 0xffff
                         : limit <= 0    ? 0
                                         : static_cast<__mmask16>((1u << limit) - 1u);
  return {_mm512_mask_blend_ps(mask, b.v, a.v)};
}
// a < b ? 0 : c
inline Vec zero_where_less(Vec a, Vec b, Vec c) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), c.v)};
}
// The even, and the odd, of 32 bfloat16 values as float32. Two functions, so that 16 registers
// never hold both at once.
inline Vec load_bf16_even(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Vec load_bf16_odd(const uint16_t* p) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), mask))};
}
// 2^n, n = the integer that (n + 1.5 * 2^23) holds in its low mantissa bits
inline Vec pow2_of_shifted(Vec shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)))};
}

#elif defined(__AVX2__)

struct Vec {
  __m256 lo, hi;
};
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec select_first(int limit, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(limit), lane));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(limit - 8), lane));
  return {_mm256_blendv_ps(b.lo, a.lo, lo), _mm256_blendv_ps(b.hi, a.hi, hi)};
}
inline Vec zero_where_less(Vec a, Vec b, Vec c) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), c.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ), c.hi)};
}
inline __m256i load_bits(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec load_bf16_even(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(load_bits(p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(load_bits(p + 16), 16))};
}
inline Vec load_bf16_odd(const uint16_t* p) {
  // Hides that these bytes were just read by load_bf16_even: the compiler would keep them in two
  // registers and push two of the twelve sums of a 6 x 16 tile out to the stack.
  asm("" : "+r"(p));
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(load_bits(p), mask)),
          _mm256_castsi256_ps(_mm256_and_si256(load_bits(p + 16), mask))};
}
inline __m256 pow2_of_shifted_half(__m256 shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}
inline Vec pow2_of_shifted(Vec shifted) {
  return {pow2_of_shifted_half(shifted.lo), pow2_of_shifted_half(shifted.hi)};
}

#else

struct Vec {
  float v[kLanes];
};
template <class Function>
inline Vec map(Function function) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = function(i);
  return r;
}
inline uint32_t to_bits(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}
inline Vec load(const float* p) {
  return map([&](int i) { return p[i]; });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
inline Vec set1(float a) {
  return map([&](int) { return a; });
}
inline Vec add(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec div(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec select_first(int limit, Vec a, Vec b) {
  return map([&](int i) { return i < limit ? a.v[i] : b.v[i]; });
}
inline Vec zero_where_less(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] < b.v[i] ? 0.0f : c.v[i]; });
}
inline Vec load_bf16_even(const uint16_t* p) {
  return map([&](int i) { return from_bits(static_cast<uint32_t>(p[2 * i]) << 16); });
}
inline Vec load_bf16_odd(const uint16_t* p) {
  return map([&](int i) { return from_bits(static_cast<uint32_t>(p[2 * i + 1]) << 16); });
}
inline Vec pow2_of_shifted(Vec shifted) {
  return map([&](int i) { return from_bits((to_bits(shifted.v[i]) << 23) + 0x3f800000u); });
}

#endif

// Lanes are added as a tree, (0+8)+(4+12) ...: the same order on every instruction set.
inline float reduce_add(Vec a) {
  float t[kLanes];
  store(t, a);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

inline float reduce_max(Vec a) {
  float t[kLanes];
  store(t, a);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = t[i] > t[i + width] ? t[i] : t[i + width];
  return t[0];
}

// e^x to about 1 ulp: x = n ln 2 + r, degree-6 polynomial in r, times 2^n. Below -87 it is 0,
// above 88.3 infinite.
inline Vec exp(Vec x) {
  const Vec low = set1(-87.0f);
  const Vec clamped = min(set1(89.0f), max(low, x));  // in this order NaN passes through
  const Vec shift = set1(12582912.0f);                // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(clamped, set1(1.44269504088896341f), shift);
  const Vec n = sub(shifted, shift);
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, set1(1.0f)));
  return zero_where_less(x, low, mul(p, pow2_of_shifted(shifted)));
}

}  // namespace
