// Every weight of a model in one arena, packed for the CPU ops, filled by tensor name.
#pragma once

#include <memory>
#include <string>

#include "core/arena.h"
#include "cpu/context.h"
#include "engine/weight_table.h"

namespace flexidepth {

class Weights : public WeightTable {
 public:
  explicit Weights(const ModelShape& shape);

  // The tensor `name` (canonical names, docs/architecture.md), row-major [rows, columns]; vectors
  // have rows = length, columns = 1. Throws Error on an unknown or repeated name, a wrong shape or
  // values that are not finite.
  void set(const std::string& name, const void* source, DType dtype, int64_t rows, int64_t columns,
           const cpu::Context& context);

  // Checks that every tensor has arrived whole and folds the routers.
  void finish();

  size_t bytes() const { return arena_ == nullptr ? 0 : arena_->used(); }

 private:
  void place();

  std::unique_ptr<Arena> arena_;
};

}  // namespace flexidepth
