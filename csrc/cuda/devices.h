// The driver and the devices that this process sees. Needs none to be called.
#pragma once

#include <string>
#include <vector>

namespace flexidepth::cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t memory_bytes;
};

struct Devices {
  int error;               // cudaError_t of looking for devices; 0 = none
  std::string error_text;  // what CUDA says of it
  int runtime_version;     // 13000 = 13.0, of the runtime that is linked
  int driver_version;      // the newest that the driver supports, 0 = no driver
  std::vector<Device> devices;
};

Devices find_devices();

}  // namespace flexidepth::cuda
