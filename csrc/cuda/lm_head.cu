#include "cuda/outputs.cuh"
#include "ops/lm_head.h"

namespace flexidepth::cuda {

void lm_head(const LmHeadArgs& args, const Context& context) {
  if (args.best != nullptr)
    dev::fill_zero("lm_head", args.best, static_cast<size_t>(args.h.count) * sizeof(uint64_t),
                   context);
  const LinearOutput logits{
      args.weight, {args.logits, args.weight.n, nullptr, args.h.count}, false, nullptr};
  run_output("lm_head", args.h, logits, args.norm, args.eps, args.best, context);
}

}  // namespace flexidepth::cuda
