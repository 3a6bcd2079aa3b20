// What every CUDA op needs besides its arguments. No CUDA header: bindings include this too.
#pragma once

namespace flexidepth::cuda {

struct Context {
  void* stream = nullptr;  // cudaStream_t of the device that holds every pointer of the arguments
  // Kernels begin while those before them end (programmatic dependent launch, compute
  // capability 9.0).
  bool overlap = false;
  bool check = false;  // wait for each kernel, so that an error names its op
};

}  // namespace flexidepth::cuda
