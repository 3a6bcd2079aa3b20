#include "ops/lm_head.h"

#include "cpu/context.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace flexidepth::cpu {

void lm_head(const LmHeadArgs& args, const Context& context) {
  const int64_t width = args.weight.k;
  rms_norm({args.h, {args.normed, width, nullptr, args.h.count}, args.norm, width, args.eps},
           context);
  LinearArgs project;
  project.x = {args.normed, width, nullptr, args.h.count};
  project.outputs[0] = {
      args.weight, {args.logits, args.weight.n, nullptr, args.h.count}, false, nullptr};
  linear(project, context);
}

}  // namespace flexidepth::cpu
