// CUDA on the CPU, for tests: the threads of a block are fibers that take turns in one system
// thread.
//
// A thread runs until it needs others (a barrier, a shuffle, a matrix multiplication of its warp),
// then the next one runs. The order of turns is a choice (set_order): a kernel that forgets a
// barrier computes something else in another order. Errors that hang or corrupt a GPU are
// exceptions here, with block, thread and the place: a barrier that not all threads reach, lanes of
// a warp at different places, a lane that left. Shared memory begins as NaN and ends where it was
// said to end, so AddressSanitizer sees what lies beyond.
//
// The blocks of a plain launch run one after the other. Those of a cooperative one
// (launch_together) are all there, at most as many as the device is said to run at once
// (set_resident), and each runs as far as it can before the next does, in the chosen order: a
// barrier of the grid that is missing shows as other results, one that not all blocks reach is an
// error. There, what was loaded as weights must not change until the end. Not covered: other races
// between blocks, and those within a warp's step.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace pybind11 {
class module_;
}

namespace flexidepth::emulation {

// broken.cu
void register_broken_kernels(pybind11::module_& m);

using Place = std::source_location;

enum class Order : int { kForward = 0, kReverse = 1, kShuffled = 2 };
void set_order(Order order, uint32_t seed);
// How many grids have run so far, and how many of them with all their blocks at once.
int64_t launches();
int64_t launches_together();

// From now on addresses that kernels prefetch are kept, until they are taken.
void record_prefetches();
std::vector<uintptr_t> take_prefetches();
void note_prefetch(const void* at);

// Blocks that the device is said to run at once.
void set_resident(int blocks);
int64_t resident();
// From now on others have so much of the device that cooperative launches are refused, or no more.
void set_crowded(bool crowded);
bool crowded();

// The running thread's place in the grid.

int thread_index();
int64_t num_blocks();
int64_t block_index(int axis);
unsigned char* shared_memory();

void block_barrier(Place place);
// Waits until every lane of the warp is here with its `data`; then `step` runs once on all of them.
void warp_step(void* data, void (*step)(void* const lanes[32]), Place place);

// The two halves of the grid's barrier. Every block's are at the same places.
uint32_t arrive_at_grid(uint32_t* barrier, Place place);
void wait_for_grid(uint32_t* barrier, uint32_t before, Place place);
// 16 bytes of weights were read there.
void note_weights(const void* from);

// Runs body() for every thread of every block. Throws Error.
void run_grid(const char* op, dim3 grid, int threads, size_t shared_bytes, void (*body)(void*),
              void* argument);
// The same with all blocks at once: a cooperative launch.
void run_together(const char* op, int64_t blocks, int threads, size_t shared_bytes,
                  void (*body)(void*), void* argument);

}  // namespace flexidepth::emulation

namespace flexidepth::cuda {

struct Context;
struct BFloat16;
struct Float16;
struct Chunk;

namespace dev {

using emulation::Place;

inline int thread() { return emulation::thread_index(); }
inline int64_t block(int axis = 0) { return emulation::block_index(axis); }

inline int64_t blocks() { return emulation::num_blocks(); }

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared_memory());
}

inline void sync_block(Place place = Place::current()) { emulation::block_barrier(place); }

inline void keep_order() {}
float shuffle_xor(float value, int lanes, Place place = Place::current());
uint64_t shuffle_xor(uint64_t value, int lanes, Place place = Place::current());
float shuffle(float value, int lane, Place place = Place::current());
uint32_t ballot(bool value, Place place = Place::current());
inline int count_bits(uint32_t bits) { return std::popcount(bits); }
Chunk load_once(const void* from);
Chunk load_once_if(bool wanted, const void* from);
Chunk load_written(const void* from);
Chunk load_written_if(bool wanted, const void* from);
Chunk load_if(bool wanted, const void* from);

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
float half_bits_to_float(uint16_t bits);
uint16_t float_to_half_bits(float value);

inline int32_t fetch_add(int32_t* at, int32_t value) { return std::exchange(*at, *at + value); }
inline uint32_t fetch_add(uint32_t* at, uint32_t value) { return std::exchange(*at, *at + value); }
inline uint64_t fetch_add(uint64_t* at, uint64_t value) { return std::exchange(*at, *at + value); }
inline void fetch_max(uint64_t* at, uint64_t value) { *at = *at < value ? value : *at; }
inline void fence() {}
inline void await_inputs() {}
inline uint32_t arrive_at_grid(uint32_t* barrier, Place place = Place::current()) {
  return emulation::arrive_at_grid(barrier, place);
}
inline void wait_for_grid(uint32_t* barrier, uint32_t before, Place place = Place::current()) {
  emulation::wait_for_grid(barrier, before, place);
}
inline void prefetch_by_warp(const void* at, int64_t bytes) {
  for (int64_t line = thread() % 32 * 128; line < bytes; line += 32 * 128)
    emulation::note_prefetch(static_cast<const char*>(at) + line);
}

uint32_t pack(float low, float high, BFloat16);
uint32_t pack(float low, float high, Float16);
void load_transposed(uint32_t (&out)[4], const void* row, Place place = Place::current());
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16,
         Place place = Place::current());
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16,
         Place place = Place::current());

// So few that the blocks of small products have several tasks each.
template <class... Params>
constexpr int64_t blocks_at_once(const char*, void (*)(Params...), int, size_t) {
  return 3;
}

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
            const Context&, const Args&... args) {
  auto call = [&] { kernel(args...); };
  emulation::run_grid(
      op, grid, threads, shared_bytes, [](void* c) { (*static_cast<decltype(call)*>(c))(); },
      &call);
}

template <class... Params>
int64_t resident_blocks(const char*, void (*)(Params...), int, size_t) {
  return emulation::resident();
}

template <class... Params, class... Args>
bool launch_together(const char* op, void (*kernel)(Params...), int64_t blocks, int threads,
                     size_t shared_bytes, const Context&, const Args&... args) {
  auto call = [&] { kernel(args...); };
  if (emulation::crowded()) return false;
  emulation::run_together(
      op, blocks, threads, shared_bytes, [](void* c) { (*static_cast<decltype(call)*>(c))(); },
      &call);
  return true;
}

inline void fill_zero(const char*, void* at, size_t bytes, const Context&) {
  std::memset(at, 0, bytes);
}

}  // namespace dev
}  // namespace flexidepth::cuda
