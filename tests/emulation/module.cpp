// The CUDA ops on the CPU: the same bindings and the same kernels as flexidepth_ext._cuda.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "emulation/cuda.h"

PYBIND11_MODULE(_emulated, m) {
  namespace e = flexidepth::emulation;
  flexidepth::bindings::register_errors(m);
  flexidepth::bindings::register_cuda_ops(m);
  flexidepth::bindings::register_cuda_engine(m);
  e::register_broken_kernels(m);
  m.def("set_resident", &e::set_resident);
  m.def("set_crowded", &e::set_crowded);
  m.def("set_order",
        [](int order, uint32_t seed) { e::set_order(static_cast<e::Order>(order), seed); });
  m.def("launches", &e::launches);
  m.def("launches_together", &e::launches_together);
  m.def("prefetches_of", [](const pybind11::function& call) {
    e::record_prefetches();
    call();
    return e::take_prefetches();
  });
}
