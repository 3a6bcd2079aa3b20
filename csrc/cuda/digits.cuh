// Looking for a value among many by its key's digits, eight bits at a time from the highest: each
// pass counts the values, or what they weigh, by one digit, and the count from above says which
// digit the wanted one has. Counts are whole numbers: they have no order.
#pragma once

#include "cuda/device.cuh"

namespace flexidepth::cuda {

constexpr int kDigits = 256;
constexpr int kKeyDigits = 4;  // of a key

// What a block of kThreads shares of a pass, all of them members.
template <int kThreads>
struct DigitCounts {
  static constexpr int kGroup = 16;  // digits
  static constexpr int kCopies = 8;  // of the counts: lanes of a warp find the same digit often
  static_assert(kThreads >= kDigits);

  uint32_t low[kDigits * kCopies];  // of 64-bit sums; a copy's neighbours are in other banks
  uint32_t high[kDigits * kCopies];
  uint64_t mass[kDigits];
  uint64_t groups[kDigits / kGroup];
  uint32_t digit;  // the chosen one
  uint64_t above;  // what lies above the digits that were chosen so far

  // By all threads; a barrier comes next.
  __device__ void clear() {
    for (int i = dev::thread(); i < kDigits * kCopies; i += kThreads) low[i] = high[i] = 0;
  }

  // By any thread, in its lane's copy. Halves of 32 bits, which shared memory adds by itself: 64
  // bits it would only exchange, again and again while others do.
  __device__ void add(uint32_t of, uint64_t value) {
    const uint32_t at = of * kCopies + static_cast<uint32_t>(dev::thread() % kCopies);
    const auto lower = static_cast<uint32_t>(value);
    auto upper = static_cast<uint32_t>(value >> 32);
    if (dev::fetch_add(&low[at], lower) + lower < lower) ++upper;  // it went round
    if (upper > 0) dev::fetch_add(&high[at], upper);
  }
  __device__ void add_one(uint32_t of) {
    dev::fetch_add(&low[of * kCopies + static_cast<uint32_t>(dev::thread() % kCopies)], 1u);
  }

  // By all threads behind a barrier: the block's counts onto those of all blocks.
  __device__ void add_to(uint64_t* total) const {
    if (dev::thread() >= kDigits) return;
    uint64_t sum = 0;
    for (int i = dev::thread() * kCopies; i < (dev::thread() + 1) * kCopies; ++i)
      sum += low[i] + (static_cast<uint64_t>(high[i]) << 32);
    if (sum > 0) dev::fetch_add(&total[dev::thread()], sum);
  }

  // The sum over all digits, by one thread within choose().
  __device__ uint64_t all() const {
    uint64_t sum = 0;
    for (int g = 0; g < kDigits / kGroup; ++g) sum += groups[g];
    return sum;
  }

  // By all threads, when every block has added: the digit in which the count from above passes
  // wanted(), which thread 0 asks. It leaves the block in step.
  template <class Wanted>
  __device__ void choose(const uint64_t* total, bool first, const Wanted& wanted) {
    if (dev::thread() < kDigits) mass[dev::thread()] = total[dev::thread()];
    dev::sync_block();
    if (dev::thread() < kDigits / kGroup) {
      uint64_t sum = 0;
      for (int i = 0; i < kGroup; ++i) sum += mass[dev::thread() * kGroup + i];
      groups[dev::thread()] = sum;
    }
    dev::sync_block();
    if (dev::thread() == 0) {
      const uint64_t least = wanted();
      uint64_t over = first ? 0 : above;
      int d = kDigits - 1;
      for (; d >= kGroup && over + groups[d / kGroup] < least; d -= kGroup)
        over += groups[d / kGroup];
      while (d > 0 && over + mass[d] < least) over += mass[d--];
      digit = static_cast<uint32_t>(d);
      above = over;
    }
    dev::sync_block();
  }
};

}  // namespace flexidepth::cuda
