// Each area of the module registers itself; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace flexidepth::bindings {

void register_errors(pybind11::module_& m);
void register_build_info(pybind11::module_& m);
void register_ops(pybind11::module_& m);
void register_engine(pybind11::module_& m);
// Of the module _cuda.
void register_cuda_ops(pybind11::module_& m);
void register_cuda_engine(pybind11::module_& m);

}  // namespace flexidepth::bindings
