// The weights of a model in device memory, which the caller owns: as they stand in a checkpoint,
// row-major.
#pragma once

#include "engine/weight_table.h"

namespace flexidepth {

class CudaWeights : public WeightTable {
 public:
  using WeightTable::WeightTable;

  // The tensor `name` (canonical names, docs/architecture.md) at a device address, a multiple of 16
  // bytes. Matrices have the model's type, the router's and all vectors float32. Throws Error on an
  // unknown or repeated name, a wrong shape or type, or a misaligned address.
  void set(const std::string& name, const void* address, DType dtype, int64_t rows,
           int64_t columns);

  // What the j-th routed layer's router needs behind its first matrix and its norm. folded: [d_r],
  // null where its last two matrices are set one by one (strict_router).
  void set_router(int64_t routed, const float* folded, float bias);

  // Checks that everything is there.
  void finish() const { check_complete(); }
};

}  // namespace flexidepth
