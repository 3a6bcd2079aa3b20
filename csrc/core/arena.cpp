#include "core/arena.h"

#include "core/check.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define FD_HAS_MMAP 1
#else
#include <cstdlib>
#include <cstring>
#endif

namespace flexidepth {

namespace {
[[noreturn]] void fail_out_of_memory(size_t bytes) {
  fail(ErrorKind::kMemory, "memory: the system refused ", bytes,
       " bytes; close other programs, use a smaller dtype or a shorter max_length");
}
}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  mapped_ = align_up(bytes, bytes >= kHugePage ? kHugePage : 4096);
#ifdef FD_HAS_MMAP
  // Over-map by one huge page and trim, so that the start lies on a huge-page border.
  const size_t slack = mapped_ >= kHugePage ? kHugePage : 0;
  void* raw =
      mmap(nullptr, mapped_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) fail_out_of_memory(bytes);
  auto* start = static_cast<uint8_t*>(raw);
  if (slack != 0) {
    const size_t head = align_up(reinterpret_cast<uintptr_t>(start), kHugePage) -
                        reinterpret_cast<uintptr_t>(start);
    if (head != 0) munmap(start, head);
    if (slack - head != 0) munmap(start + head + mapped_, slack - head);
    start += head;
#ifdef MADV_HUGEPAGE
    madvise(start, mapped_, MADV_HUGEPAGE);  // advice only: refusal costs speed, not correctness
#endif
  }
  data_ = start;
#else
  data_ = static_cast<uint8_t*>(std::aligned_alloc(4096, mapped_));
  if (data_ == nullptr) fail_out_of_memory(bytes);
  std::memset(data_, 0, mapped_);
#endif
}

void Buffer::release() {
  if (data_ == nullptr) return;
#ifdef FD_HAS_MMAP
  munmap(data_, mapped_);
#else
  std::free(data_);
#endif
  data_ = nullptr;
  size_ = mapped_ = 0;
}

uint8_t* Arena::take(size_t bytes) {
  const size_t need = align_up(bytes);
  check(used_ + need <= buffer_.size(), ErrorKind::kInternal, "arena: ", need, " bytes asked, ",
        buffer_.size() - used_, " of ", buffer_.size(), " left");
  uint8_t* piece = buffer_.data() + used_;
  used_ += need;
  return piece;
}

}  // namespace flexidepth
