// Threshold and token compaction: who runs the layer, who skips it, and how the two results are
// weighted.
//   run = forced ? forced[i] : gate[i] > threshold            (strict; a NaN gate skips)
//   run_index, skip_index: row numbers in ascending order
//   run_scale = w, skip_scale = 1 - w with multiplier gates; 1 and 1 with hard or straight-through
//   gates
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct CompactArgs {
  const float* gates;  // [rows], gate_stride apart
  int64_t gate_stride;
  const uint8_t* forced;  // [rows], forced_stride apart, nonzero = run; null = the gate decides
  int64_t forced_stride;
  float threshold;
  bool unit_scales;  // hard or straight-through
  int64_t rows;
  uint8_t* ran;  // [rows], ran_stride apart: 1 = run
  int64_t ran_stride;
  int32_t* run_index;                   // [rows] room; the first num_run are written
  int32_t* skip_index;                  // [rows] room
  float* run_scale;                     // [rows] room, in the order of run_index
  float* skip_scale;                    // [rows] room, in the order of skip_index
  int32_t* counts;                      // [2]: rows that run, rows that skip
  const float* threshold_at = nullptr;  // CUDA: the threshold in device memory; null = `threshold`
};

namespace cpu {
void compact(const CompactArgs& args);
}
namespace cuda {
void compact(const CompactArgs& args, const Context& context);
}

}  // namespace flexidepth
