#include "cuda/outputs.cuh"
#include "ops/lm_head.h"

namespace flexidepth::cuda {

void lm_head(const LmHeadArgs& args, const Context& context) {
  if (args.best != nullptr)
    dev::fill_zero("lm_head", args.best, static_cast<size_t>(args.h.count) * sizeof(uint64_t),
                   context);
  LinearArgs project;
  project.x = args.h;
  project.outputs[0] = {
      args.weight, {args.logits, args.weight.n, nullptr, args.h.count}, false, nullptr};
  run_outputs("lm_head", project, args.norm, args.eps, args.best, context);
}

}  // namespace flexidepth::cuda
