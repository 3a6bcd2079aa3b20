#include "engine/weights.h"

#include <cmath>

#include "core/check.h"
#include "ops/pack.h"

namespace flexidepth {

namespace {

float element(const void* source, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source)[i];
  const uint16_t bits = static_cast<const uint16_t*>(source)[i];
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : half_to_float(bits);
}

[[noreturn]] void fail_not_finite(const std::string& name, int64_t bad, int64_t total) {
  fail(ErrorKind::kValue, "weights: ", bad, " of ", total, " values of ", name,
       " are NaN or infinite; the checkpoint is damaged, load another copy");
}

}  // namespace

Weights::Weights(const ModelShape& shape) : WeightTable(shape) {
  check(shape.dtype != DType::kFloat16, ErrorKind::kUnsupported,
        "engine: float16 weights are not supported on the CPU; use bfloat16 or float32");
  place();
}

// Gives every slot its piece of one arena.
void Weights::place() {
  size_t total = 0;
  const auto size = [](const Slot& s) {
    return align_up(s.matrix != nullptr ? cpu::packed_bytes(s.dtype, s.rows, s.columns)
                                        : static_cast<size_t>(s.rows) * sizeof(float));
  };
  for (const auto& [name, s] : slots_) total += size(s);
  total += shape_.routing_layers.size() *
           align_up(static_cast<size_t>(shape_.router_dim) * sizeof(float));
  arena_ = std::make_unique<Arena>(total);
  for (auto& [name, s] : slots_) {
    uint8_t* piece = arena_->take(size(s));
    if (s.matrix != nullptr) {
      s.matrix->data = piece;
    } else {
      *s.vector = reinterpret_cast<const float*>(piece);
    }
  }
}

void Weights::set(const std::string& name, const void* source, DType dtype, int64_t rows,
                  int64_t columns, const cpu::Context& context) {
  Slot& s = claim(name, rows, columns);
  int64_t bad = 0;
  if (s.matrix != nullptr) {
    bad = cpu::pack({source, dtype, rows, columns, const_cast<uint8_t*>(s.matrix->data), s.dtype},
                    context);
  } else {
    auto* out = const_cast<float*>(*s.vector);
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = element(source, dtype, i);
      bad += std::isfinite(out[i]) ? 0 : 1;
    }
  }
  if (bad > 0) fail_not_finite(name, bad, rows * columns);
  s.filled = true;
}

void Weights::finish() {
  check_complete();
  std::vector<float> dec(static_cast<size_t>(shape_.hidden_size * shape_.router_dim));
  for (LayerWeights& layer : layers_) {
    if (layer.routed_index < 0) continue;
    const float* bias = router_biases_[static_cast<size_t>(layer.routed_index)];
    if (bias != nullptr) layer.router.bias = *bias;
    if (shape_.strict_router) continue;
    for (int64_t i = 0; i < shape_.hidden_size; ++i)
      cpu::unpack_row(layer.router.dec, i, dec.data() + i * shape_.router_dim);
    auto* folded = reinterpret_cast<float*>(
        arena_->take(static_cast<size_t>(shape_.router_dim) * sizeof(float)));
    cpu::fold_router(dec.data(), layer.router.head, shape_.hidden_size, shape_.router_dim, folded);
    layer.router.folded = folded;
  }
}

}  // namespace flexidepth
