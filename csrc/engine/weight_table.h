// Which weights a model has, by name, and where each belongs: what the engines of both devices
// share.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/model_shape.h"
#include "ops/layer_weights.h"

namespace flexidepth {

class WeightTable {
 public:
  explicit WeightTable(const ModelShape& shape);
  WeightTable(const WeightTable&) = delete;  // slots point into it
  WeightTable& operator=(const WeightTable&) = delete;

  const std::vector<LayerWeights>& layers() const { return layers_; }
  const PackedMatrix& embedding() const { return embedding_; }
  const PackedMatrix& lm_head() const { return shape_.tied_embeddings ? embedding_ : lm_head_; }
  const float* final_norm() const { return final_norm_; }

 protected:
  struct Slot {
    int64_t rows = 0;
    int64_t columns = 0;
    PackedMatrix* matrix = nullptr;  // a matrix, or
    const float** vector = nullptr;  // a float32 vector
    DType dtype = DType::kFloat32;
    bool filled = false;
  };

  // The slot of a tensor that has come. Throws Error on an unknown or repeated name, or a wrong
  // shape; whoever fills the slot says so in it.
  Slot& claim(const std::string& name, int64_t rows, int64_t columns);
  // Throws Error(kValue) that names what is missing.
  void check_complete() const;

  ModelShape shape_;
  std::vector<LayerWeights> layers_;
  PackedMatrix embedding_, lm_head_;
  const float* final_norm_ = nullptr;
  std::map<std::string, Slot> slots_;
  std::vector<const float*> router_biases_;  // [routed]

 private:
  void add_matrix(const std::string& name, PackedMatrix* matrix, int64_t rows, int64_t columns,
                  DType dtype);
  void add_vector(const std::string& name, const float** vector, int64_t length);
  void add_layer(int64_t index);
  void add_routing(const std::string& prefix, LayerWeights& layer);
};

// "model.layers.3."
std::string layer_prefix(int64_t index);

}  // namespace flexidepth
