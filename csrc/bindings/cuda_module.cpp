// The extension module flexidepth_ext._cuda, there where CUDA was built. Apart from _C, so that a
// machine whose driver is broken still has the CPU.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "cuda/devices.h"

namespace {

namespace py = pybind11;

py::dict find_devices() {
  const flexidepth::cuda::Devices found = flexidepth::cuda::find_devices();
  py::list devices;
  for (const auto& device : found.devices) {
    py::dict one;
    one["name"] = device.name;
    one["capability"] = py::make_tuple(device.major, device.minor);
    one["multiprocessors"] = device.multiprocessors;
    one["memory_bytes"] = device.memory_bytes;
    devices.append(one);
  }
  py::dict report;
  report["error"] = found.error;
  report["error_text"] = found.error_text;
  report["runtime_version"] = found.runtime_version;
  report["driver_version"] = found.driver_version;
  report["devices"] = devices;
  return report;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Compiled CUDA ops of flexidepth; use flexidepth_ext.cuda_ops.";
  flexidepth::bindings::register_errors(m);
  flexidepth::bindings::register_cuda_ops(m);
  flexidepth::bindings::register_cuda_engine(m);
  m.attr("archs") = FD_CUDA_ARCHS;
  m.def("find_devices", &find_devices, "Driver, runtime and the devices that this process sees.");
}
