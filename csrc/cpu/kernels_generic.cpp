// The kernels for any processor.
#include "cpu/kernels_impl.h"

namespace flexidepth::cpu {

const Kernels* kernels_generic() {
  static const Kernels table = make_kernels("generic", dot_bf16);
  return &table;
}

}  // namespace flexidepth::cpu
