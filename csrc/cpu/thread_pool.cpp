#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>

#ifdef __linux__
#include <sched.h>
#endif

namespace flexidepth::cpu {

namespace {

// Longer than the pause between two tokens (sampling, detokenising), so that decoding never pays a
// wake-up.
constexpr auto kSpinTime = std::chrono::microseconds(500);
constexpr int kPausesPerClockRead = 64;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Processors that a cpu.max file ("quota period" or "max period") allows; 0 = no limit or no such
// file.
double quota_in(const std::string& path) {
  std::ifstream file(path);
  std::string quota;
  double period = 0;
  return file >> quota >> period && quota != "max" && period > 0 ? std::stod(quota) / period : 0;
}

// The tightest CPU quota of this process's control group and of those above it; 0 = none.
double cgroup_quota() {
  std::string group, line;
  for (std::ifstream own("/proc/self/cgroup"); std::getline(own, line);)
    if (line.rfind("0::", 0) == 0) group = line.substr(3);
  double tightest = 0;
  for (;;) {
    const double quota = quota_in("/sys/fs/cgroup" + group + "/cpu.max");
    if (quota > 0 && (tightest == 0 || quota < tightest)) tightest = quota;
    const size_t parent = group.find_last_of('/');
    if (parent == std::string::npos) break;
    group.resize(parent);
  }
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
      v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double limit = 0, period = 0;
  if (tightest == 0 && v1_quota >> limit && v1_period >> period && limit > 0 && period > 0)
    return limit / period;
  return tightest;
}

}  // namespace

int available_threads() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) count = CPU_COUNT(&mask);
#endif
  const double quota = cgroup_quota();
  if (quota > 0) count = std::min(count, static_cast<int>(std::ceil(quota)));
  return std::max(count, 1);
}

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { worker(); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  wake_.fetch_add(1);
  wake_.notify_all();
  for (auto& thread : workers_) thread.join();
}

bool ThreadPool::claim_and_run() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const auto next = static_cast<uint32_t>(ticket & 0xffff);
    const auto chunks = static_cast<uint32_t>((ticket >> 16) & 0xffff);
    if (next >= chunks) return false;
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
      function_(context_, next);
      finished_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }
}

void ThreadPool::execute(uint32_t chunks, void* context, Chunk function) {
  function_ = function;
  context_ = context;
  finished_.store(0, std::memory_order_relaxed);
  const uint64_t phase = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store((phase << 32) | (static_cast<uint64_t>(chunks) << 16), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) {
    wake_.fetch_add(1);
    wake_.notify_all();
  }
  while (claim_and_run()) {
  }
  for (int spins = 0; finished_.load(std::memory_order_acquire) != chunks; ++spins) {
    pause();
    // The thread that holds the last chunk may need this very core.
    if (spins > 20000) std::this_thread::yield();
  }
}

void ThreadPool::worker() {
  while (!stop_.load(std::memory_order_relaxed)) {
    if (claim_and_run()) continue;
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    bool worked = false;
    while (!worked && !stop_.load(std::memory_order_relaxed)) {
      for (int i = 0; i < kPausesPerClockRead && !worked; ++i) {
        pause();
        worked = claim_and_run();
      }
      if (!worked && std::chrono::steady_clock::now() >= deadline) break;
    }
    if (worked) continue;
    // Announce the sleep, then look once more: execute() stores the ticket before it reads
    // sleepers_.
    const uint32_t seen = wake_.load();
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    if (!claim_and_run() && !stop_.load()) wake_.wait(seen);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace flexidepth::cpu
