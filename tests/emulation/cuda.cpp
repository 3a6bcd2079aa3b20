#include "emulation/cuda.h"

#include <algorithm>
#include <exception>
#include <map>
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

enum class State { kReady, kAtBarrier, kInWarp, kAtGrid, kDone };

// One thread of a block. Its stack holds the rest of its state while others run.
struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::kReady;
  Place place;
  void* data = nullptr;
  void (*step)(void* const*) = nullptr;
  const uint32_t* barrier = nullptr;  // kAtGrid: the grid's, and what it was
  uint32_t before = 0;
#ifdef FD_ASAN
  void* fake_stack = nullptr;
#endif
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  size_t first_stack = 0;
  std::unique_ptr<unsigned char[]> shared;
  size_t grid_barriers = 0;  // that it has come to
};

struct Grid {
  const char* op = "";
  dim3 size;
  Block* block = nullptr;  // the running one
  int threads = 0;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  int running = 0;  // thread of the block
  std::exception_ptr error;
  bool resident = false;             // all blocks are there at once
  std::vector<Place> grid_barriers;  // in the order in which blocks come to them
  const uint32_t* grid_barrier = nullptr;
  std::map<const void*, cuda::Chunk> weights;  // what was loaded as such
  void* scheduler = nullptr;                   // its stack pointer while a fiber runs
#ifdef FD_ASAN
  void* scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#endif
};

thread_local Grid* grid = nullptr;
int64_t grids = 0;
int64_t grids_together = 0;  // that have run
thread_local bool recording = false;
thread_local std::vector<uintptr_t> prefetches;
thread_local Order turn_order = Order::kForward;
thread_local uint32_t turn_seed = 0;
thread_local int resident_blocks = 3;
thread_local bool others_are_there = false;
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
  Fiber& fiber = grid->block->fibers[static_cast<size_t>(grid->running)];
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
  Fiber& fiber = grid->block->fibers[static_cast<size_t>(index)];
#ifdef FD_ASAN
  __sanitizer_start_switch_fiber(
      &grid->scheduler_fake, stacks[grid->block->first_stack + static_cast<size_t>(index)].get(),
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
  grid->block->fibers[static_cast<size_t>(grid->running)].state = State::kDone;
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
  const dim3& block = grid->block->index;
  fail(ErrorKind::kInternal, grid->op, ": block (", block.x, ", ", block.y, ", ", block.z,
       "): ", what);
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
    waiting += grid->block->fibers[static_cast<size_t>(i)].state == State::kInWarp;
  if (waiting == 0) return false;
  Fiber* lanes = &grid->block->fibers[static_cast<size_t>(first)];
  for (int i = 0; i < last - first; ++i) {
    if (lanes[i].state == State::kReady || lanes[i].state == State::kAtGrid) return false;
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
  for (const Fiber& fiber : grid->block->fibers) {
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kAtBarrier) return false;
    if (first == nullptr) first = &fiber;
    if (!same(fiber.place, first->place))
      broken("thread " + std::to_string(&fiber - grid->block->fibers.data()) +
             " waits at the barrier " + describe(fiber.place) + ", thread " +
             std::to_string(first - grid->block->fibers.data()) + " at that of " +
             describe(first->place));
  }
  if (first == nullptr) return false;
  for (const Fiber& fiber : grid->block->fibers)
    if (fiber.state == State::kDone)
      broken("thread " + std::to_string(&fiber - grid->block->fibers.data()) +
             " has left, the others wait at the barrier " + describe(first->place));
  for (Fiber& fiber : grid->block->fibers) fiber.state = State::kReady;
  return true;
}

void begin_block(Block& block) {
  block.fibers.resize(static_cast<size_t>(grid->threads));
  while (stacks.size() < block.first_stack + block.fibers.size())
    stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
  for (size_t i = 0; i < block.fibers.size(); ++i)
    prepare(block.fibers[i], stacks[block.first_stack + i].get());
  // Exactly as large as asked: what lies behind it is a sanitizer's red zone.
  if (block.shared == nullptr) block.shared.reset(new unsigned char[grid->shared_bytes]);
  std::fill_n(block.shared.get(), grid->shared_bytes, static_cast<unsigned char>(0xff));
}

bool can_go_on(const Fiber& fiber) {
  return fiber.state == State::kReady ||
         (fiber.state == State::kAtGrid && cuda::grid_passed(fiber.before, *fiber.barrier));
}

// Runs a block until it has left or waits for others; whether it did anything.
bool run_block(Block& block, std::mt19937& random) {
  grid->block = &block;
  std::vector<int> turns(static_cast<size_t>(grid->threads));
  std::iota(turns.begin(), turns.end(), 0);
  if (turn_order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  for (bool ever = false;;) {
    if (turn_order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    bool moved = false;
    for (int i : turns) {
      Fiber& fiber = block.fibers[static_cast<size_t>(i)];
      if (!can_go_on(fiber)) continue;
      fiber.state = State::kReady;
      to_fiber(i);
      if (grid->error) std::rethrow_exception(grid->error);
      moved = true;
    }
    for (int first = 0; first < grid->threads; first += kLanes) moved |= finish_warp(first);
    moved |= finish_barrier();
    if (!moved) return ever;  // whoever waits within the block was let go or reported above
    ever = true;
  }
}

// Nobody can go on: an error unless all have left.
void check_all_left(std::vector<Block>& blocks) {
  for (Block& block : blocks) {
    grid->block = &block;
    const Fiber& first = block.fibers[0];
    if (first.state == State::kDone) continue;
    for (const Block& other : blocks)
      if (other.grid_barriers < block.grid_barriers)
        broken("waits at the grid's barrier " + describe(first.place) + ", block (" +
               std::to_string(other.index.x) + ", 0, 0) has left");
    broken("waits for ever at the grid's barrier " + describe(first.place));
  }
}

void check_weights() {
  for (const auto& [at, chunk] : grid->weights)
    if (std::memcmp(at, &chunk, sizeof chunk) != 0)
      fail(ErrorKind::kInternal, grid->op,
           ": memory that was loaded as weights (load_once) changed while the kernel ran");
}

// Makes a grid the running one.
struct Running {
  Grid own;
  Grid* before = grid;
  Running(const char* op, dim3 size, int threads, size_t shared_bytes, void (*body)(void*),
          void* argument) {
    check(size.x > 0 && size.y > 0 && size.z > 0 && size.y < 65536 && size.z < 65536 &&
              threads > 0 && threads <= 1024,
          ErrorKind::kInternal, op, ": a launch of (", size.x, ", ", size.y, ", ", size.z,
          ") blocks of ", threads, " threads");
    check(shared_bytes <= 99 << 10, ErrorKind::kInternal, op, ": ", shared_bytes,
          " bytes of shared memory; a block of every architecture has 101376");
    own.op = op;
    own.size = size;
    own.threads = threads;
    own.shared_bytes = shared_bytes;
    own.body = body;
    own.argument = argument;
    grid = &own;
  }
  ~Running() { grid = before; }
};

}  // namespace

void record_prefetches() {
  recording = true;
  prefetches.clear();
}

std::vector<uintptr_t> take_prefetches() {
  recording = false;
  return std::move(prefetches);
}

void note_prefetch(const void* at) {
  if (recording) prefetches.push_back(reinterpret_cast<uintptr_t>(at));
}

void set_order(Order order, uint32_t seed) {
  turn_order = order;
  turn_seed = seed;
}

int64_t launches() { return grids; }
int64_t launches_together() { return grids_together; }
void set_resident(int blocks) { resident_blocks = blocks; }
int64_t resident() { return resident_blocks; }
void set_crowded(bool crowded) { others_are_there = crowded; }
bool crowded() { return others_are_there; }

int thread_index() { return grid->running; }
int64_t block_index(int axis) {
  const dim3& block = grid->block->index;
  return axis == 0 ? block.x : axis == 1 ? block.y : block.z;
}
int64_t num_blocks() { return grid->size.x; }
unsigned char* shared_memory() { return grid->block->shared.get(); }

void block_barrier(Place place) {
  Fiber& fiber = grid->block->fibers[static_cast<size_t>(grid->running)];
  fiber.state = State::kAtBarrier;
  fiber.place = place;
  to_scheduler(false);
}

void warp_step(void* data, void (*step)(void* const*), Place place) {
  Fiber& fiber = grid->block->fibers[static_cast<size_t>(grid->running)];
  fiber.state = State::kInWarp;
  fiber.place = place;
  fiber.data = data;
  fiber.step = step;
  to_scheduler(false);
}

uint32_t arrive_at_grid(uint32_t* barrier, Place place) {
  block_barrier(place);
  if (grid->running != 0) return 0;
  if (!grid->resident) broken("a grid's barrier in a launch that is not cooperative");
  const size_t number = grid->block->grid_barriers++;
  if (number == grid->grid_barriers.size()) grid->grid_barriers.push_back(place);
  if (!same(grid->grid_barriers[number], place))
    broken("comes to the grid's barrier " + describe(place) + ", others to that of " +
           describe(grid->grid_barriers[number]));
  grid->grid_barrier = barrier;
  const uint32_t before = *barrier;
  *barrier += cuda::grid_arrival(grid->block->index.x, num_blocks());
  return before;
}

void wait_for_grid(uint32_t* barrier, uint32_t before, Place place) {
  if (grid->running == 0) {
    Fiber& fiber = grid->block->fibers[0];
    fiber.barrier = barrier;
    fiber.before = before;
    fiber.place = place;
    fiber.state = State::kAtGrid;
    to_scheduler(false);
  }
  block_barrier(place);
}

void note_weights(const void* from) {
  if (!grid->resident) return;
  cuda::Chunk chunk;
  std::memcpy(&chunk, from, sizeof chunk);
  grid->weights.emplace(from, chunk);
}

void run_grid(const char* op, dim3 size, int threads, size_t shared_bytes, void (*body)(void*),
              void* argument) {
  ++grids;
  Running running(op, size, threads, shared_bytes, body, argument);
  std::mt19937 random(turn_seed);
  Block block;
  dim3& index = block.index;
  for (index.z = 0; index.z < size.z; ++index.z)
    for (index.y = 0; index.y < size.y; ++index.y)
      for (index.x = 0; index.x < size.x; ++index.x) {
        begin_block(block);
        run_block(block, random);
      }
}

void run_together(const char* op, int64_t together, int threads, size_t shared_bytes,
                  void (*body)(void*), void* argument) {
  ++grids;
  ++grids_together;
  check(together <= resident_blocks, ErrorKind::kInternal, op, ": ", together,
        " blocks that wait for each other; the device runs ", resident_blocks, " at once");
  const auto count = static_cast<size_t>(together);
  Running running(op, dim3(static_cast<unsigned>(count)), threads, shared_bytes, body, argument);
  grid->resident = true;
  std::mt19937 random(turn_seed);
  std::vector<Block> blocks(count);
  std::vector<size_t> turns(count);
  std::iota(turns.begin(), turns.end(), size_t{0});
  if (turn_order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  for (size_t i = 0; i < count; ++i) {
    blocks[i].index = dim3(static_cast<unsigned>(i), 0, 0);
    blocks[i].first_stack = i * static_cast<size_t>(threads);
    begin_block(blocks[i]);
  }
  for (bool moved = true; moved;) {
    if (turn_order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    moved = false;
    for (const size_t i : turns) moved |= run_block(blocks[i], random);
  }
  check_all_left(blocks);
  check_weights();
  check(grid->grid_barrier == nullptr || (*grid->grid_barrier & ~cuda::kGridBit) == 0,
        ErrorKind::kInternal, op, ": the grid's barrier is not at rest when the kernel has ended");
}

}  // namespace flexidepth::emulation
