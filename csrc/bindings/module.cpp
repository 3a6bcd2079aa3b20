// The extension module flexidepth_ext._C.
#include "bindings/register.h"

PYBIND11_MODULE(_C, m) {
  namespace b = flexidepth::bindings;
  m.doc() =
      "Compiled ops and engine of flexidepth; use flexidepth_ext.ops and flexidepth_ext.Engine.";
  b::register_errors(m);
  b::register_build_info(m);
  // The engine's classes first: signatures of ops name KVCache.
  b::register_engine(m);
  b::register_ops(m);
}
