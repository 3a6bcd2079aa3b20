#include "cpu/rounded_rows.h"

#include <algorithm>
#include <atomic>

namespace flexidepth::cpu {

namespace {

thread_local RoundedRows own;

}  // namespace

uint64_t RoundedRows::new_call() {
  static std::atomic<uint64_t> calls{0};
  return ++calls;
}

void RoundedRows::begin(uint64_t call) {
  if (own.call_ != call) own.base_ = nullptr;
  own.call_ = call;
}

bool RoundedRows::holds(const Rows& x, int64_t begin, int64_t end, int64_t k) const {
  return base_ == x.base && index_ == x.index && k_ == k && begin_ <= begin && end <= end_;
}

const RoundedRows& RoundedRows::of(RoundRow round, const Rows& x, int64_t begin, int64_t end,
                                   int64_t k) {
  if (own.base_ != nullptr && own.holds(x, begin, end, k)) return own;
  // A power of two apart, rows would fall on the same lines of the cache: one line more.
  own.stride_ = (k + kRoundedInputs - 1) / kRoundedInputs * (kRoundedInputs / 2) + 16;
  const auto rows = static_cast<size_t>(end - begin + kRoundedRows - 1);
  const size_t bytes = rows * static_cast<size_t>(own.stride_) * sizeof(uint32_t);
  if (own.memory_.size() < bytes) own.memory_ = Buffer(std::max(bytes, kHugePage));
  for (int64_t m = begin; m < end; ++m) round(x.row(m), k, own.pairs() + (m - begin) * own.stride_);
  own.base_ = x.base;
  own.index_ = x.index;
  own.begin_ = begin;
  own.end_ = end;
  own.k_ = k;
  return own;
}

}  // namespace flexidepth::cpu
