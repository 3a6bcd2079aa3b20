#include "ops/compact.h"

namespace flexidepth::cpu {

void compact(const CompactArgs& args) {
  int64_t num_run = 0, num_skip = 0;
  for (int64_t i = 0; i < args.rows; ++i) {
    const float w = args.gates[i * args.gate_stride];
    const bool run =
        args.forced != nullptr ? args.forced[i * args.forced_stride] != 0 : w > args.threshold;
    args.ran[i * args.ran_stride] = run ? 1 : 0;
    if (run) {
      args.run_index[num_run] = static_cast<int32_t>(i);
      args.run_scale[num_run++] = args.unit_scales ? 1.0f : w;
    } else {
      args.skip_index[num_skip] = static_cast<int32_t>(i);
      args.skip_scale[num_skip++] = args.unit_scales ? 1.0f : 1.0f - w;
    }
  }
  args.counts[0] = static_cast<int32_t>(num_run);
  args.counts[1] = static_cast<int32_t>(num_skip);
}

}  // namespace flexidepth::cpu
