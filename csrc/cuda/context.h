// What every CUDA op needs besides its arguments. No CUDA header: bindings include this too.
#pragma once

namespace flexidepth::cuda {

struct Context {
  void* stream = nullptr;  // cudaStream_t of the device that holds every pointer of the arguments
};

}  // namespace flexidepth::cuda
