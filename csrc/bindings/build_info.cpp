// What this binary was built from, for `flexidepth doctor`.
#include <pybind11/stl.h>

#include "bindings/register.h"

namespace flexidepth::bindings {

namespace py = pybind11;

void register_build_info(py::module_& m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FD_VERSION;
        info["compiler"] = FD_COMPILER;
        info["build_type"] = FD_BUILD_TYPE;
        info["cuda"] = false;
        info["cuda_reason"] = FD_CUDA_REASON;
        return info;
      },
      "Version, compiler, build type, and whether CUDA kernels are inside (and why not).");
}

}  // namespace flexidepth::bindings
