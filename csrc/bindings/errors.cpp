// flexidepth::Error to the Python classes of flexidepth_ext.errors, by kind.
#include "bindings/register.h"
#include "core/check.h"

namespace flexidepth::bindings {

namespace py = pybind11;

namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kShape:
      return "ShapeError";
    case ErrorKind::kValue:
      return "ValueOutOfRangeError";
    case ErrorKind::kDtype:
      return "DtypeError";
    case ErrorKind::kUnsupported:
      return "UnsupportedError";
    case ErrorKind::kBusy:
      return "EngineBusyError";
    case ErrorKind::kClosed:
      return "EngineClosedError";
    case ErrorKind::kMemory:
      return "OutOfMemoryError";
    case ErrorKind::kInternal:
      break;
  }
  return "InternalError";
}

}  // namespace

void register_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      const py::object type =
          py::module_::import("flexidepth_ext.errors").attr(class_of(error.kind()));
      PyErr_SetString(type.ptr(), error.what());
    }
  });
}

}  // namespace flexidepth::bindings
