// One row's decision, for the kernel that takes many rows and for the one that takes a few.
#pragma once

#include "cuda/rows.cuh"
#include "ops/compact.h"

namespace flexidepth::cuda {

__device__ __forceinline__ bool row_runs(const CompactArgs& args, int64_t i, float gate) {
  if (args.forced != nullptr) return args.forced[i * args.forced_stride] != 0;
  return gate > (args.threshold_at == nullptr ? args.threshold : *args.threshold_at);
}

// Row i is the place-th of those that run, or of those that skip.
__device__ __forceinline__ void write_decision(const CompactArgs& args, int64_t i, float gate,
                                               bool run, int64_t place) {
  args.ran[i * args.ran_stride] = run ? 1 : 0;
  if (run) {
    args.run_index[place] = static_cast<int32_t>(i);
    args.run_scale[place] = args.unit_scales ? 1.0f : gate;
  } else {
    args.skip_index[place] = static_cast<int32_t>(i);
    args.skip_scale[place] = args.unit_scales ? 1.0f : 1.0f - gate;
  }
}

}  // namespace flexidepth::cuda
