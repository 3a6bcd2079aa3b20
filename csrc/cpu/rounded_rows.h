// The rows of inputs that a thread is at work on, rounded to bfloat16 once for all panels.
#pragma once

#include <cstdint>

#include "core/arena.h"
#include "cpu/kernels.h"
#include "ops/rows.h"

namespace flexidepth::cpu {

class RoundedRows {
 public:
  // A number for a phase; what was rounded in an earlier one is of other inputs.
  static uint64_t new_call();
  // This thread works on phase `call` from now on.
  static void begin(uint64_t call);
  // This thread's rounded rows, which contain x[begin, end) with k inputs each. Good until the next
  // call.
  static const RoundedRows& of(RoundRow round, const Rows& x, int64_t begin, int64_t end,
                               int64_t k);

  // The rounded row m of x; kRoundedRows - 1 more behind the last one can be read.
  const uint32_t* row(int64_t m) const { return pairs() + (m - begin_) * stride_; }
  // Pairs from a row to the next.
  int64_t stride() const { return stride_; }

 private:
  bool holds(const Rows& x, int64_t begin, int64_t end, int64_t k) const;

  uint32_t* pairs() const { return reinterpret_cast<uint32_t*>(memory_.data()); }

  // One huge page at least: in small ones some processes multiply a third slower,
  // docs/architecture.md.
  Buffer memory_;
  const float* base_ = nullptr;  // null: nothing is held
  const int32_t* index_ = nullptr;
  int64_t begin_ = 0, end_ = 0, k_ = 0, stride_ = 0;
  uint64_t call_ = 0;
};

}  // namespace flexidepth::cpu
