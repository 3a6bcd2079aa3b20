// A small persistent pool for phases of a few microseconds. Threads claim chunks of a phase; the
// caller claims too and waits only for chunks that somebody claimed, so a worker that the system
// has put to sleep (or that shares its core with another library's spinning threads) delays nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace flexidepth::cpu {

class ThreadPool {
 public:
  // num_threads includes the calling thread; at least 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(begin, end) over pieces of [0, total), at most `chunks_per_thread` pieces a thread,
  // and returns when all are done. body must not throw and must not call run() itself. One caller
  // at a time.
  template <class Body>
  void run(int64_t total, int chunks_per_thread, const Body& body) {
    const int64_t wanted = static_cast<int64_t>(size()) * chunks_per_thread;
    const int64_t chunks = total < wanted ? total : wanted;
    if (chunks <= 0) return;
    if (size() == 1 || chunks == 1) {
      body(int64_t{0}, total);
      return;
    }
    struct Call {
      const Body& body;
      int64_t total, chunks;
    } call{body, total, chunks};
    execute(static_cast<uint32_t>(chunks), &call, [](void* context, uint32_t chunk) {
      const auto& c = *static_cast<const Call*>(context);
      c.body(c.total * chunk / c.chunks, c.total * (chunk + 1) / c.chunks);
    });
  }

 private:
  using Chunk = void (*)(void* context, uint32_t chunk);

  void execute(uint32_t chunks, void* context, Chunk function);
  bool claim_and_run();
  void worker();

  // ticket_ = phase number (32 bits) | chunks (16) | next chunk (16). A successful claim of a chunk
  // of phase n proves that phase n is not over, so function_ and context_ belong to it.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> wake_{0};
  Chunk function_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

// Processors this process may use: its affinity mask, cut by the cgroup's CPU quota (rounded up).
int available_threads();

}  // namespace flexidepth::cpu
