// What kernels use of CUDA, each instruction in one function of namespace dev. With FD_EMULATE the
// same sources run on the CPU, in tests: tests/emulation/cuda.h has the other half of this file.
#pragma once

#ifdef FD_EMULATE
#include "emulation/cuda.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <cstdint>

namespace flexidepth::cuda {

constexpr int kWarp = 32;

// Storage types of weights and cache; arithmetic is float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct alignas(16) Chunk {  // what one load instruction brings
  uint32_t word[4];
};

// The barrier of a grid is one number: every block adds to it, together they change its highest bit
// and leave the others at 0, so that it serves the next barrier and the next launch as it is.
constexpr uint32_t kGridBit = 0x80000000u;
constexpr uint32_t grid_arrival(int64_t block, int64_t blocks) {
  return block == 0 ? kGridBit - static_cast<uint32_t>(blocks - 1) : 1u;
}
constexpr bool grid_passed(uint32_t before, uint32_t now) {
  return ((before ^ now) & kGridBit) != 0;
}

#ifndef FD_EMULATE
namespace dev {

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block(int axis = 0) {
  return axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z;
}

__device__ __forceinline__ int64_t blocks() { return gridDim.x; }

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char fd_shared_memory[];
  return reinterpret_cast<T*>(fd_shared_memory);
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
// The compiler moves no load or store past this point; the processor may.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }
__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
__device__ __forceinline__ uint64_t shuffle_xor(uint64_t value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(value), lanes);
}
// What another lane of the warp has.
__device__ __forceinline__ float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ __forceinline__ uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

// 16 bytes of weights: read once, so not kept in the L1 cache, and written by no kernel.
__device__ __forceinline__ Chunk load_once(const void* from) {
  Chunk c;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
      : "l"(from));
  return c;
}

// The same where it is wanted, else zeros; without a branch, so that no other load waits for it.
__device__ __forceinline__ Chunk load_once_if(bool wanted, const void* from) {
  Chunk c{};
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(c.word[0]), "+r"(c.word[1]), "+r"(c.word[2]), "+r"(c.word[3])
      : "l"(from), "r"(static_cast<uint32_t>(wanted)));
  return c;
}

// The first thing that a kernel does on what others wrote, by every thread. Launched with `overlap`
// (cuda/context.h) a kernel begins while the one before it still runs: here it waits until that one
// and all its writes are done, and lets the one behind it begin in turn.
__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings bytes into the L2 cache, by a whole warp, all of whose lanes ask for the same. From
// compute capability 9.0 on one instruction does it, for whole 16 bytes; before, a lane a line.
__device__ __forceinline__ void prefetch_by_warp(const void* at, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  const auto address = reinterpret_cast<uintptr_t>(at);
  const auto whole = static_cast<uint32_t>((address % 16 + bytes) / 16 * 16);
  if (thread() % kWarp == 0 && whole > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address / 16 * 16), "r"(whole));
#else
  for (int64_t line = thread() % kWarp * 128; line < bytes; line += kWarp * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(at) + line));
#endif
}

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_half_bits(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

// 16 bytes that kernels before this one wrote: not before await_inputs.
__device__ __forceinline__ Chunk load_written(const void* from) {
  Chunk c;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
               : "l"(from)
               : "memory");
  return c;
}

// The same where it is wanted, else zeros; without a branch.
__device__ __forceinline__ Chunk load_written_if(bool wanted, const void* from) {
  Chunk c{};
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(c.word[0]), "+r"(c.word[1]), "+r"(c.word[2]), "+r"(c.word[3])
      : "l"(from), "r"(static_cast<uint32_t>(wanted))
      : "memory");
  return c;
}
// 16 bytes that kernels or other blocks wrote, where they are wanted, else zeros; kept in the L1
// cache.
__device__ __forceinline__ Chunk load_if(bool wanted, const void* from) {
  Chunk c{};
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(c.word[0]), "+r"(c.word[1]), "+r"(c.word[2]), "+r"(c.word[3])
      : "l"(from), "r"(static_cast<uint32_t>(wanted))
      : "memory");
  return c;
}

__device__ __forceinline__ int32_t fetch_add(int32_t* at, int32_t value) {
  return atomicAdd(at, value);
}
__device__ __forceinline__ uint32_t fetch_add(uint32_t* at, uint32_t value) {
  return atomicAdd(at, value);
}
__device__ __forceinline__ uint64_t fetch_add(uint64_t* at, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(at), value);
}
__device__ __forceinline__ void fetch_max(uint64_t* at, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), value);
}
// What this thread, and those that it met in a barrier, wrote before is seen by other blocks before
// what it writes next; likewise what it reads. Not __threadfence(), which orders more than that.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// The barrier of all blocks of a cooperative launch (launch_together), in two halves: between them
// a thread touches nothing that kernels write, and may bring weights closer. The second half takes
// what the first one gave. barrier: one number, 0 before its first use.
//
// What any thread wrote before is read by any thread behind it, with plain loads: sync_block puts
// the block's writes before its first thread's release, the fence behind the load that sees all
// releases puts them before what this block's threads do behind their sync_block, and it drops the
// L1 cache's old lines, which are those of the whole multiprocessor. Loads of the non-coherent way
// (load_once) have no part in this order: they are for weights.
__device__ __forceinline__ uint32_t arrive_at_grid(uint32_t* barrier) {
  __syncthreads();
  uint32_t before = 0;
  if (threadIdx.x == 0)
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(barrier), "r"(grid_arrival(blockIdx.x, gridDim.x))
                 : "memory");
  return before;
}
__device__ __forceinline__ void wait_for_grid(uint32_t* barrier, uint32_t before) {
  if (threadIdx.x == 0) {
    uint32_t now;
    do {  // relaxed: an acquire drops the L1 cache's lines each time
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
    } while (!grid_passed(before, now));
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncthreads();
}

// Two values, rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t pack(float low, float high, Float16) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Four matrices of 8 x 8 values of 16 bits from shared memory, transposed: lane i names row i % 8
// of matrix i / 8; the lane gets a fragment of each as mma takes it for b.
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const void* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

// c += a b^T with a [16, 16] and b [8, 16], fragments as PTX defines them for mma.m16n8k16.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dev
#endif

// float32 of a stored value and back, rounded to nearest even.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return dev::float_of(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 value) {
  return dev::half_bits_to_float(value.bits);
}
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = dev::bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
  return {dev::float_to_half_bits(value)};
}

// The sum over a warp, in an order that is always the same; every lane gets it.
template <class Value>
__device__ __forceinline__ Value warp_sum(Value value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += dev::shuffle_xor(value, lanes);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value = fmaxf(value, dev::shuffle_xor(value, lanes));
  return value;
}
__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint64_t other = dev::shuffle_xor(value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace flexidepth::cuda
