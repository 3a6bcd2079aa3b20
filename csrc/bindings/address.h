// Pointers as Python hands them over: the integers of Tensor.data_ptr() and of a stream's handle.
#pragma once

#include <cstdint>

namespace flexidepth::bindings {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace flexidepth::bindings
