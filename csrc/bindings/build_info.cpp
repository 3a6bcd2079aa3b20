// What this binary was built from, for `flexidepth doctor`.
#include <pybind11/stl.h>

#include <string>

#include "bindings/register.h"
#include "build_config.h"

namespace flexidepth::bindings {

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FD_VERSION;
  info["commit"] = FD_COMMIT;
  info["compiler"] = FD_COMPILER;
  info["pybind11"] =
      std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  info["build_type"] = FD_BUILD_TYPE;
  info["flags"] = FD_CXX_FLAGS;
  info["architecture"] = FD_ARCHITECTURE;
  info["kernels"] = FD_KERNELS;
  info["sanitize"] = FD_SANITIZE;
#ifdef FD_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_plan"] = FD_CUDA_PLAN;
  info["cuda_archs"] = FD_CUDA_ARCHS;
  return info;
}

}  // namespace

void register_build_info(py::module_& m) {
  m.def("build_info", &build_info,
        "Version, commit, compiler, flags and kernels of this binary; whether CUDA is inside and "
        "why.");
}

}  // namespace flexidepth::bindings
