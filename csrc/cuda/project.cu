#include "core/check.h"
#include "cuda/project.cuh"

namespace flexidepth::cuda {

void project(const ProjectArgs& args, const Context& context) {
  if (args.h.count == 0) return;
  const PackedMatrix& any = args.first.n > 0 ? args.first : args.k;
  const Input in{args.h, any.k, args.norm, args.eps};
  const int64_t units = (args.rotate_first ? args.first.n / 2 : paired_units(args.first.n)) +
                        args.k.n / 2 + paired_units(args.v.n);
  if (args.first.n > 0 && args.k.n > 0 && args.first.dtype != args.k.dtype) {
    check(args.first.dtype == DType::kFloat32 && !args.rotate_first, ErrorKind::kUnsupported,
          "project: the first matrix is of another type than keys and values; wanted the same, or "
          "the router's in float32");
    // One type after the other.
    ProjectArgs code = args, cached = args;
    code.k.n = code.v.n = cached.first.n = 0;
    project(code, context);
    project(cached, context);
    return;
  }
  with_type(any.dtype, [&](auto type) {
    using T = decltype(type);
    run_product<T>("project", in, Projection<T>{args, -1}, units, context);
  });
}

}  // namespace flexidepth::cuda
