#include "ops/rms_norm.h"

#include <cmath>

#include "cpu/context.h"

namespace flexidepth::cpu {

void rms_norm(const RmsNormArgs& args, const Context& context) {
  for_rows(context, args.x.count, args.width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* x = args.x.row(i);
      const float mean =
          context.kernels.sum_squares(x, args.width) / static_cast<float>(args.width);
      context.kernels.scale_mul(x, 1.0f / std::sqrt(mean + args.eps), args.weight, args.y.row(i),
                                args.width);
    }
  });
}

}  // namespace flexidepth::cpu
