// Launching kernels, and what went wrong with one.
#pragma once

#include "core/check.h"
#include "core/dtype.h"
#include "cuda/context.h"
#include "cuda/device.cuh"

namespace flexidepth::cuda {

#ifndef FD_EMULATE
namespace dev {

constexpr size_t kPlainSharedBytes = 48 << 10;  // more has to be asked for

inline void check_launch(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaGetLastError();  // an error of a launch is reported once
  if (status == cudaErrorNoKernelImageForDevice)
    fail(ErrorKind::kUnsupported, op, ": this build has kernels for ", FD_CUDA_ARCHS,
         ", the device has compute capability ", major, ".", minor,
         "; build again with FLEXIDEPTH_CUDA_ARCHS=", major, minor);
  fail(status == cudaErrorMemoryAllocation ? ErrorKind::kMemory : ErrorKind::kInternal, op, ": ",
       cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

inline void allow_shared(const char* op, const void* kernel, size_t bytes) {
  if (bytes <= kPlainSharedBytes) return;
  check_launch(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
}

inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, size_t shared_bytes,
                                        const Context& context) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(context.stream);
  return config;
}

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
            const Context& context, const Args&... args) {
  allow_shared(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchConfig_t config = launch_config(grid, threads, shared_bytes, context);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = context.overlap ? 1 : 0;
  check_launch(op, cudaLaunchKernelEx(&config, kernel, args...));
  if (context.check) check_launch(op, cudaStreamSynchronize(config.stream));
}

// Blocks that the device holds at once when nothing else is there.
template <class... Params>
int64_t blocks_at_once(const char* op, void (*kernel)(Params...), int threads,
                       size_t shared_bytes) {
  allow_shared(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  int device = 0, processors = 0, resident = 0;
  check_launch(op, cudaGetDevice(&device));
  check_launch(op, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_launch(
      op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes));
  return static_cast<int64_t>(resident) * processors;
}

// Blocks that the device runs at once, so that they may wait for each other; 0 = it promises that
// for none.
template <class... Params>
int64_t resident_blocks(const char* op, void (*kernel)(Params...), int threads,
                        size_t shared_bytes) {
  int device = 0, cooperates = 0;
  check_launch(op, cudaGetDevice(&device));
  check_launch(op, cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device));
  return cooperates != 0 ? blocks_at_once(op, kernel, threads, shared_bytes) : 0;
}

// Blocks that wait for each other, at most resident_blocks. False: the device, which is shared, has
// room for fewer than were counted.
template <class... Params, class... Args>
bool launch_together(const char* op, void (*kernel)(Params...), int64_t blocks, int threads,
                     size_t shared_bytes, const Context& context, const Args&... args) {
  cudaLaunchConfig_t config =
      launch_config(dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, context);
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();
    return false;
  }
  check_launch(op, status);
  if (context.check) check_launch(op, cudaStreamSynchronize(config.stream));
  return true;
}

inline void fill_zero(const char* op, void* at, size_t bytes, const Context& context) {
  check_launch(op, cudaMemsetAsync(at, 0, bytes, static_cast<cudaStream_t>(context.stream)));
}

}  // namespace dev
#endif

// As many blocks as the device runs at once.
template <class... Params, class... Args>
void launch_resident(const char* op, void (*kernel)(Params...), int threads, size_t shared_bytes,
                     const Context& context, const Args&... args) {
  const int64_t blocks = dev::resident_blocks(op, kernel, threads, shared_bytes);
  check(blocks > 0 &&
            dev::launch_together(op, kernel, blocks, threads, shared_bytes, context, args...),
        ErrorKind::kUnsupported, op, ": this device does not run ", blocks,
        " blocks at once, which wait for each other, of ", threads, " threads and ", shared_bytes,
        " bytes of shared memory");
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// body(T{}) with the storage type of a dtype.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

}  // namespace flexidepth::cuda
