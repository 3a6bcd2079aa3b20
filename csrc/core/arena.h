// Zeroed, page-aligned memory straight from the system: resident only where touched, huge pages
// where the system grants them, and given back at once when the buffer goes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace flexidepth {

constexpr size_t kHugePage = size_t{2} << 20;

class Buffer {
 public:
  Buffer() = default;
  // Throws Error(kMemory) when the system refuses.
  explicit Buffer(size_t bytes);
  ~Buffer() { release(); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  void release();

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
  }

  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  size_t mapped_ = 0;
};

constexpr size_t kAlignment = 64;  // bytes: one cache line, one AVX-512 register

constexpr size_t align_up(size_t bytes, size_t alignment = kAlignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

// Hands out aligned pieces of one Buffer, front to back; nothing is freed singly.
class Arena {
 public:
  explicit Arena(size_t bytes) : buffer_(bytes) {}
  // Throws Error(kInternal) when the arena was sized too small.
  uint8_t* take(size_t bytes);
  size_t used() const { return used_; }
  size_t size() const { return buffer_.size(); }
  uint8_t* data() const { return buffer_.data(); }

 private:
  Buffer buffer_;
  size_t used_ = 0;
};

}  // namespace flexidepth
