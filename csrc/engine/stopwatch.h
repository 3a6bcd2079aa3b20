// Where the time of passes goes, by part of a layer. Off, which it is at first, a mark costs one
// comparison.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace flexidepth {

enum class Part {
  kInputs,       // norm, [Q or router code; K; V], rotation of K, cache
  kGate,         // gates, decisions, lists of rows
  kQueries,      // a routed layer's Q
  kAttention,    // rotation of Q, attention
  kOutput,       // W_o and the residual
  kFeedForward,  // its norm too
  kAdapter,      // its norm too where no row runs
  kHead,         // last norm and LM head
  kOther,        // tables, embedding
};
constexpr size_t kParts = 9;
constexpr std::array<const char*, kParts> kPartNames = {
    "inputs", "gate", "queries", "attention", "output", "feed_forward", "adapter", "head", "other"};

class Stopwatch {
 public:
  using Clock = std::chrono::steady_clock;

  void record(bool on) {
    on_ = on;
    seconds_ = {};
  }
  void start() {
    if (on_) last_ = Clock::now();
  }
  // What has passed since the last mark belongs to this part, of a routed layer or elsewhere.
  void mark(Part part, bool routed) {
    if (!on_) return;
    const Clock::time_point now = Clock::now();
    seconds_[routed][static_cast<size_t>(part)] +=
        std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  double seconds(size_t part, bool routed) const { return seconds_[routed][part]; }

 private:
  bool on_ = false;
  Clock::time_point last_;
  std::array<std::array<double, kParts>, 2> seconds_{};
};

}  // namespace flexidepth
