#include <cuda_runtime.h>

#include "cuda/devices.h"

namespace flexidepth::cuda {

Devices find_devices() {
  Devices found{};
  cudaRuntimeGetVersion(&found.runtime_version);
  cudaDriverGetVersion(&found.driver_version);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {  // count is as it was
    found.error = status;
    found.error_text = cudaGetErrorString(status);
    cudaGetLastError();
    return found;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    found.devices.push_back({properties.name, properties.major, properties.minor,
                             properties.multiProcessorCount, properties.totalGlobalMem});
  }
  return found;
}

}  // namespace flexidepth::cuda
