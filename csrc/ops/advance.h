// The end of a decoding step on the device: what was decided goes to the host, and every sequence
// moves on, so that the next step can begin without the host.
//   ring[step mod size] = tokens, logprobs, faults, gates, ran
//   positions += 1,  draws += 1,  step += 1
#pragma once

#include <cstdint>

#include "ops/rows.h"

namespace flexidepth {

struct AdvanceArgs {
  int64_t rows;
  int64_t num_routed;
  const int32_t* tokens;  // [rows]
  const float* logprobs;  // [rows]
  const int32_t* faults;  // [rows], a SampleFault each
  const float* gates;     // [rows, num_routed]
  const uint8_t* ran;     // [rows, num_routed]
  int64_t* positions;     // [rows]: of the tokens that the next step takes
  int64_t* draws;         // [rows]: counters of the next draw
  int64_t* step;          // [1]
  int64_t size;           // entries of the ring, which is host memory that kernels write to
  int32_t* ring_tokens;   // [size, rows]
  float* ring_logprobs;   // [size, rows]
  int32_t* ring_faults;   // [size, rows]
  float* ring_gates;      // [size, rows, num_routed]
  uint8_t* ring_ran;      // [size, rows, num_routed]
};

namespace cuda {
void advance(const AdvanceArgs& args, const Context& context);
}

}  // namespace flexidepth
