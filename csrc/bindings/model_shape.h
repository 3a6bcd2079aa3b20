// A model's sizes out of the dict that flexidepth_ext/model_shape.py makes.
#pragma once

#include <pybind11/pybind11.h>

#include "engine/model_shape.h"

namespace flexidepth::bindings {

ModelShape shape_from(const pybind11::dict& d);

}  // namespace flexidepth::bindings
