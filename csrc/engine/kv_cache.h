// Keys and values of one sequence: pages of 256 tokens, all layers of a token in the same page.
// Growing adds pages and moves nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "core/arena.h"
#include "engine/model_shape.h"
#include "ops/kv_cache.h"

namespace flexidepth {

class KvCache {
 public:
  // Holds up to max_length tokens; memory is taken page by page as tokens arrive.
  KvCache(const ModelShape& shape, int64_t max_length);

  int64_t length() const { return length_; }
  int64_t max_length() const { return max_length_; }
  size_t nbytes() const { return pages_.size() * page_bytes_; }
  const KvLayout& layout() const { return layout_; }
  size_t layer_offset(int64_t layer) const {
    return static_cast<size_t>(layer) * layout_.layer_bytes();
  }
  uint8_t* const* page_table() const { return table_.data(); }

  // Makes room for `tokens` tokens in all. Throws Error beyond max_length or without memory;
  // what the cache holds stays as it was.
  void reserve(int64_t tokens);
  void set_length(int64_t length) { length_ = length; }
  // Keeps the first `length` tokens and gives whole pages behind them back.
  void truncate(int64_t length);
  void copy_from(const KvCache& other);
  // True when both came from engines of the same shape.
  bool fits(const KvCache& other) const;
  void release();
  // Fills the slots behind length() with a bit pattern that is NaN in every type, for tests.
  void poison_unused();

 private:
  KvLayout layout_;
  int64_t num_layers_;
  int64_t max_length_;
  size_t page_bytes_;
  int64_t length_ = 0;
  std::vector<Buffer> pages_;
  std::vector<uint8_t*> table_;
};

}  // namespace flexidepth
