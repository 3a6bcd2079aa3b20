// Weights into panel layout, once, at load time.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct PackArgs {
  const void* source;  // row-major [rows, k]
  DType source_dtype;  // float32, bfloat16 or float16
  int64_t rows;
  int64_t k;
  uint8_t* packed;     // packed_bytes(), zeroed
  DType packed_dtype;  // float32, or bfloat16 (round to nearest even)
};

namespace cpu {
// Bytes of a packed [n, k] matrix; outputs are padded to a multiple of 16.
size_t packed_bytes(DType dtype, int64_t n, int64_t k);
// Returns how many source values were not finite.
int64_t pack(const PackArgs& args, const Context& context);
// One row of a packed matrix back as float32: an embedding lookup out of the LM head's weights.
void unpack_row(const PackedMatrix& matrix, int64_t row, float* out);
}  // namespace cpu

}  // namespace flexidepth
