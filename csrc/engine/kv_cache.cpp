#include "engine/kv_cache.h"

#include <cstring>

#include "core/check.h"
#include "cpu/kernels.h"

namespace flexidepth {

namespace {
int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }
}  // namespace

KvCache::KvCache(const ModelShape& shape, int64_t max_length)
    : layout_{shape.dtype, shape.num_kv_heads, shape.head_dim},
      num_layers_(shape.num_layers),
      max_length_(max_length),
      page_bytes_(static_cast<size_t>(shape.num_layers) * layout_.layer_bytes()) {
  check(max_length > 0, ErrorKind::kValue, "cache: max_length is ", max_length,
        "; it must be positive");
}

void KvCache::reserve(int64_t tokens) {
  check(tokens <= max_length_, ErrorKind::kValue, "cache: ", tokens,
        " tokens do not fit, the cache holds ", length_, " of at most ", max_length_,
        "; make it longer (max_length) or shorten the prompt");
  while (static_cast<int64_t>(pages_.size()) < pages_for(tokens)) {
    pages_.emplace_back(page_bytes_);
    table_.push_back(pages_.back().data());
  }
}

void KvCache::truncate(int64_t length) {
  check(length >= 0 && length <= length_, ErrorKind::kValue, "cache: cannot truncate to ", length,
        " tokens, it holds ", length_);
  length_ = length;
  pages_.resize(static_cast<size_t>(pages_for(length)));
  table_.resize(pages_.size());
}

bool KvCache::fits(const KvCache& other) const {
  return layout_.dtype == other.layout_.dtype &&
         layout_.num_kv_heads == other.layout_.num_kv_heads &&
         layout_.head_dim == other.layout_.head_dim && num_layers_ == other.num_layers_;
}

void KvCache::copy_from(const KvCache& other) {
  check(fits(other), ErrorKind::kShape, "cache: copy_from needs a cache of the same model");
  reserve(other.length_);
  for (size_t i = 0; i < static_cast<size_t>(pages_for(other.length_)); ++i)
    std::memcpy(table_[i], other.table_[i], page_bytes_);
  length_ = other.length_;
}

void KvCache::release() {
  pages_.clear();
  table_.clear();
  length_ = 0;
}

void KvCache::poison_unused() {
  constexpr int kNanByte = 0xff;
  for (size_t page = 0; page < pages_.size(); ++page) {
    const int64_t start = static_cast<int64_t>(page) * kPageTokens;
    if (start >= length_) {
      std::memset(table_[page], kNanByte, page_bytes_);
      continue;
    }
    const size_t element = size_of(layout_.dtype);
    const bool pairs = element == 2;
    // Element (k, lane) of a panel, see cpu/kernels.h.
    const auto offset = [&](int64_t k, int64_t lane) {
      return static_cast<size_t>(pairs ? (k / 2 * cpu::kPanel + lane) * 2 + k % 2
                                       : k * cpu::kPanel + lane) *
             element;
    };
    for (int64_t slot = length_ - start; slot < kPageTokens; ++slot) {
      for (int64_t layer = 0; layer < num_layers_; ++layer) {
        uint8_t* base = table_[page] + layer_offset(layer);
        for (int64_t head = 0; head < layout_.num_kv_heads; ++head) {
          uint8_t* keys = base + layout_.key_offset(head, slot / cpu::kPanel);
          for (int64_t i = 0; i < layout_.head_dim; ++i)
            std::memset(keys + offset(i, slot % cpu::kPanel), kNanByte, element);
          for (int64_t panel = 0; panel < layout_.value_panels(); ++panel)
            for (int64_t lane = 0; lane < cpu::kPanel; ++lane)
              std::memset(base + layout_.value_offset(head, panel) + offset(slot, lane), kNanByte,
                          element);
        }
      }
    }
  }
}

}  // namespace flexidepth
