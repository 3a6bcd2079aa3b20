// Activations rounded to bfloat16, for the kernels that multiply them so. As kernels_impl.h, in an
// unnamed namespace and included by kernels_*.cpp only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtype.h"

namespace {

// pairs[i] = x[2i], x[2i+1] as bfloat16 in 32 bits; count pairs, the odd tail filled with 0
void round_to_pairs(const float* x, int64_t n, uint32_t* pairs) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    _mm512_storeu_si512(pairs + i / 2, (__m512i)both);
  }
  for (; i < n; i += 2) {
    const uint32_t even = flexidepth::float_to_bf16(x[i]);
    const uint32_t odd = i + 1 < n ? flexidepth::float_to_bf16(x[i + 1]) : 0;
    pairs[i / 2] = even | (odd << 16);
  }
}

}  // namespace
