// The kernels for AVX2 + FMA (Haswell, Zen and later).
#include "cpu/kernels_impl.h"

namespace flexidepth::cpu {

const Kernels* kernels_avx2() {
  static const Kernels table = make_kernels("avx2", dot_bf16);
  return &table;
}

}  // namespace flexidepth::cpu
