// Every weight of a model in one arena, packed for the CPU ops, filled by tensor name.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "cpu/context.h"
#include "engine/model_shape.h"
#include "ops/rows.h"

namespace flexidepth {

struct RouterWeights {
  PackedMatrix enc;               // [d_r, d] float32
  const float* norm = nullptr;    // [d_r]
  const float* folded = nullptr;  // [d_r]; null with a strict router
  PackedMatrix dec;               // strict: [d, d_r] float32
  const float* head = nullptr;    // [d]
  float bias = 0.0f;
};

struct LayerWeights {
  const float* input_norm = nullptr;           // [d]
  const float* post_attention_norm = nullptr;  // [d]
  PackedMatrix q, k, v, o;
  PackedMatrix gate, up, down;
  int64_t routed_index = -1;  // place among the routed layers, -1 = always runs
  RouterWeights router;
  PackedMatrix adapter_gate, adapter_up, adapter_down;
};

class Weights {
 public:
  explicit Weights(const ModelShape& shape);

  // The tensor `name` (canonical names, docs/architecture.md), row-major [rows, columns]; vectors
  // have rows = length, columns = 1. Throws Error on an unknown or repeated name, a wrong shape or
  // values that are not finite.
  void set(const std::string& name, const void* source, DType dtype, int64_t rows, int64_t columns,
           const cpu::Context& context);

  // Checks that every tensor has arrived whole and folds the routers.
  void finish();

  const std::vector<LayerWeights>& layers() const { return layers_; }
  const PackedMatrix& embedding() const { return embedding_; }
  const PackedMatrix& lm_head() const { return shape_.tied_embeddings ? embedding_ : lm_head_; }
  const float* final_norm() const { return final_norm_; }
  size_t bytes() const { return arena_ == nullptr ? 0 : arena_->used(); }

 private:
  struct Slot {
    int64_t rows = 0;
    int64_t columns = 0;
    PackedMatrix* matrix = nullptr;  // a matrix to pack, or
    const float** vector = nullptr;  // a float32 vector to copy
    DType dtype = DType::kFloat32;
    bool filled = false;
  };

  void add_matrix(const std::string& name, PackedMatrix* matrix, int64_t rows, int64_t columns,
                  DType dtype);
  void add_vector(const std::string& name, const float** vector, int64_t length);
  void add_layer(int64_t index);
  void add_routing(const std::string& prefix, LayerWeights& layer);
  void place();

  ModelShape shape_;
  std::vector<LayerWeights> layers_;
  PackedMatrix embedding_, lm_head_;
  const float* final_norm_ = nullptr;
  std::map<std::string, Slot> slots_;
  std::vector<const float*> router_biases_;  // [routed]
  std::unique_ptr<Arena> arena_;
};

}  // namespace flexidepth
