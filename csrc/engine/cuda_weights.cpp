#include "engine/cuda_weights.h"

#include "core/check.h"

namespace flexidepth {

void CudaWeights::set(const std::string& name, const void* address, DType dtype, int64_t rows,
                      int64_t columns) {
  Slot& s = claim(name, rows, columns);
  check(dtype == s.dtype, ErrorKind::kDtype, "weights: ", name, " has type ", name_of(dtype),
        "; wanted ", name_of(s.dtype));
  check(reinterpret_cast<uintptr_t>(address) % 16 == 0, ErrorKind::kValue, "weights: ", name,
        " lies at an address that is no multiple of 16 bytes; copy it (Tensor.clone)");
  if (s.matrix != nullptr) {
    s.matrix->data = static_cast<const uint8_t*>(address);
  } else {
    *s.vector = static_cast<const float*>(address);
  }
  s.filled = true;
}

void CudaWeights::set_router(int64_t routed, const float* folded, float bias) {
  check(routed >= 0 && routed < shape_.num_routed(), ErrorKind::kValue, "weights: router ", routed,
        "; there are ", shape_.num_routed());
  const int64_t index = shape_.routing_layers[static_cast<size_t>(routed)];
  RouterWeights& router = layers_[static_cast<size_t>(index)].router;
  router.folded = folded;
  router.bias = bias;
  const std::string prefix = layer_prefix(index) + "router.";
  if (shape_.router_bias) slots_[prefix + "head.bias"].filled = true;
  if (folded == nullptr) return;
  slots_[prefix + "dec.weight"].filled = true;
  slots_[prefix + "head.weight"].filled = true;
}

}  // namespace flexidepth
