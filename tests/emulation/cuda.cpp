#include "emulation/cuda.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"
#include "cuda/device.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FD_ASAN 1
#endif

namespace flexidepth::emulation {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

// One thread of a block. Its stack holds the rest of its state while others run.
struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::kReady;
  Place place;
  void* data = nullptr;
  void (*step)(void* const*) = nullptr;
#ifdef FD_ASAN
  void* fake_stack = nullptr;
#endif
};

struct Grid {
  const char* op = "";
  dim3 size;
  dim3 block;  // index of the running one
  int threads = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::vector<Fiber> fibers;
  int running = 0;
  std::exception_ptr error;
  void* scheduler = nullptr;  // its stack pointer while a fiber runs
#ifdef FD_ASAN
  void* scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

thread_local Grid* grid = nullptr;
int64_t grids = 0;  // that have run
thread_local unsigned char* shared = nullptr;
thread_local Order turn_order = Order::kForward;
thread_local uint32_t turn_seed = 0;
// Stacks are kept from launch to launch.
thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;

#if defined(__x86_64__)
// Saves the registers that a call keeps, changes stacks, and restores those of the other side.
extern "C" void fd_switch_stacks(void** save, void* to);
asm(R"(
.text
.type fd_switch_stacks, @function
fd_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fd_switch_stacks, .-fd_switch_stacks
)");
constexpr int kSavedWords = 6;
#elif defined(__aarch64__)
extern "C" void fd_switch_stacks(void** save, void* to);
asm(R"(
.text
.type fd_switch_stacks, @function
fd_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fd_switch_stacks, .-fd_switch_stacks
)");
#else
#error "the emulation changes stacks by hand, which is written for x86-64 and aarch64"
#endif

void to_scheduler(bool last) {
  Fiber& fiber = grid->fibers[static_cast<size_t>(grid->running)];
#ifdef FD_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, grid->scheduler_bottom,
                                 grid->scheduler_size);
#else
  static_cast<void>(last);
#endif
  fd_switch_stacks(&fiber.stack_pointer, grid->scheduler);
#ifdef FD_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &grid->scheduler_bottom, &grid->scheduler_size);
#endif
}

void to_fiber(int index) {
  grid->running = index;
  Fiber& fiber = grid->fibers[static_cast<size_t>(index)];
#ifdef FD_ASAN
  __sanitizer_start_switch_fiber(&grid->scheduler_fake, stacks[static_cast<size_t>(index)].get(),
                                 kStackBytes);
#endif
  fd_switch_stacks(&grid->scheduler, fiber.stack_pointer);
#ifdef FD_ASAN
  __sanitizer_finish_switch_fiber(grid->scheduler_fake, nullptr, nullptr);
#endif
}

// The first frame of every fiber.
void enter() {
#ifdef FD_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &grid->scheduler_bottom, &grid->scheduler_size);
#endif
  try {
    grid->body(grid->argument);
  } catch (...) {  // no exception may leave its stack
    grid->error = std::current_exception();
  }
  grid->fibers[static_cast<size_t>(grid->running)].state = State::kDone;
  to_scheduler(true);
}

void prepare(Fiber& fiber, unsigned char* stack) {
  fiber = Fiber();
#ifdef FD_ASAN
  // The last one to use the stack left without returning, so the marks of its frames are still
  // there.
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  auto* words = reinterpret_cast<uintptr_t*>(top);
  *--words = 0;  // keeps the stack as a call leaves it
  *--words = reinterpret_cast<uintptr_t>(&enter);
  for (int i = 0; i < kSavedWords; ++i) *--words = 0;
  fiber.stack_pointer = words;
#else
  auto* words = reinterpret_cast<uintptr_t*>(top - 160);
  std::fill_n(words, 20, uintptr_t{0});
  words[11] = reinterpret_cast<uintptr_t>(&enter);  // x30
  fiber.stack_pointer = words;
#endif
}

std::string describe(const Place& place) {
  std::string file = place.file_name();
  const size_t slash = file.rfind('/');
  if (slash != std::string::npos) file = file.substr(slash + 1);
  return file + ":" + std::to_string(place.line());
}

[[noreturn]] void broken(const std::string& what) {
  fail(ErrorKind::kInternal, grid->op, ": block (", grid->block.x, ", ", grid->block.y, ", ",
       grid->block.z, "): ", what);
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Lets a warp go on whose lanes are all in the same step.
bool finish_warp(int first) {
  const int last = std::min(first + kLanes, grid->threads);
  int waiting = 0;
  for (int i = first; i < last; ++i)
    waiting += grid->fibers[static_cast<size_t>(i)].state == State::kInWarp;
  if (waiting == 0) return false;
  Fiber* lanes = &grid->fibers[static_cast<size_t>(first)];
  for (int i = 0; i < last - first; ++i) {
    if (lanes[i].state == State::kReady) return false;
    if (lanes[i].state == State::kInWarp) continue;
    const bool left = lanes[i].state == State::kDone;
    const Fiber* other = std::find_if(lanes, lanes + (last - first),
                                      [](const Fiber& f) { return f.state == State::kInWarp; });
    broken("thread " + std::to_string(first + i) +
           (left ? " has left" : " waits at the block's barrier " + describe(lanes[i].place)) +
           ", its warp waits for it at " + describe(other->place));
  }
  if (last - first < kLanes) broken("a warp of fewer than 32 threads has a warp step");
  void* data[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    if (!same(lanes[i].place, lanes[0].place))
      broken("thread " + std::to_string(first + i) + " is in the warp step at " +
             describe(lanes[i].place) + ", thread " + std::to_string(first) + " in that at " +
             describe(lanes[0].place));
    data[i] = lanes[i].data;
  }
  lanes[0].step(data);
  for (int i = 0; i < kLanes; ++i) lanes[i].state = State::kReady;
  return true;
}

// Lets the block go on when every thread waits at the same barrier.
bool finish_barrier() {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : grid->fibers) {
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kAtBarrier) return false;
    if (first == nullptr) first = &fiber;
    if (!same(fiber.place, first->place))
      broken("thread " + std::to_string(&fiber - grid->fibers.data()) + " waits at the barrier " +
             describe(fiber.place) + ", thread " + std::to_string(first - grid->fibers.data()) +
             " at that of " + describe(first->place));
  }
  if (first == nullptr) return false;
  for (const Fiber& fiber : grid->fibers)
    if (fiber.state == State::kDone)
      broken("thread " + std::to_string(&fiber - grid->fibers.data()) +
             " has left, the others wait at the barrier " + describe(first->place));
  for (Fiber& fiber : grid->fibers) fiber.state = State::kReady;
  return true;
}

void run_block(std::mt19937& random) {
  std::vector<int> turns(static_cast<size_t>(grid->threads));
  std::iota(turns.begin(), turns.end(), 0);
  if (turn_order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  for (size_t i = 0; i < grid->fibers.size(); ++i) prepare(grid->fibers[i], stacks[i].get());
  for (;;) {
    if (turn_order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    bool moved = false;
    for (int i : turns) {
      if (grid->fibers[static_cast<size_t>(i)].state != State::kReady) continue;
      to_fiber(i);
      if (grid->error) std::rethrow_exception(grid->error);
      moved = true;
    }
    for (int first = 0; first < grid->threads; first += kLanes) moved |= finish_warp(first);
    moved |= finish_barrier();
    if (!moved) return;  // everybody is done: whoever waits was let go or reported above
  }
}

}  // namespace

void set_order(Order order, uint32_t seed) {
  turn_order = order;
  turn_seed = seed;
}

int64_t launches() { return grids; }

int thread_index() { return grid->running; }
int64_t block_index(int axis) {
  return axis == 0 ? grid->block.x : axis == 1 ? grid->block.y : grid->block.z;
}
unsigned char* shared_memory() { return shared; }

void block_barrier(Place place) {
  Fiber& fiber = grid->fibers[static_cast<size_t>(grid->running)];
  fiber.state = State::kAtBarrier;
  fiber.place = place;
  to_scheduler(false);
}

void warp_step(void* data, void (*step)(void* const*), Place place) {
  Fiber& fiber = grid->fibers[static_cast<size_t>(grid->running)];
  fiber.state = State::kInWarp;
  fiber.place = place;
  fiber.data = data;
  fiber.step = step;
  to_scheduler(false);
}

void run_grid(const char* op, dim3 size, int threads, size_t shared_bytes, void (*body)(void*),
              void* argument) {
  ++grids;
  Grid own;
  own.op = op;
  own.size = size;
  own.threads = threads;
  own.body = body;
  own.argument = argument;
  own.fibers.resize(static_cast<size_t>(threads));
  while (stacks.size() < own.fibers.size())
    stacks.push_back(std::make_unique<unsigned char[]>(kStackBytes));
  check(size.x > 0 && size.y > 0 && size.z > 0 && size.y < 65536 && size.z < 65536 && threads > 0 &&
            threads <= 1024,
        ErrorKind::kInternal, op, ": a launch of (", size.x, ", ", size.y, ", ", size.z,
        ") blocks of ", threads, " threads");
  check(shared_bytes <= 99 << 10, ErrorKind::kInternal, op, ": ", shared_bytes,
        " bytes of shared memory; a block of every architecture has 101376");
  // Exactly as large as asked: what lies behind it is a sanitizer's red zone.
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes]);
  struct Restore {
    Grid* before = grid;
    ~Restore() { grid = before; }
  } restore;
  grid = &own;
  shared = memory.get();
  std::mt19937 random(turn_seed);
  for (own.block.z = 0; own.block.z < size.z; ++own.block.z)
    for (own.block.y = 0; own.block.y < size.y; ++own.block.y)
      for (own.block.x = 0; own.block.x < size.x; ++own.block.x) {
        std::fill_n(memory.get(), shared_bytes, static_cast<unsigned char>(0xff));
        run_block(random);
      }
}

}  // namespace flexidepth::emulation
