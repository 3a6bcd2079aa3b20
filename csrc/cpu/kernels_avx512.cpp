// The kernels for AVX-512 F/BW/DQ/VL.
#include "cpu/kernels_impl.h"

namespace flexidepth::cpu {

const Kernels* kernels_avx512() {
  static const Kernels table = make_kernels("avx512", dot_bf16);
  return &table;
}

}  // namespace flexidepth::cpu
