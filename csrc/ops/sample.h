// One token out of a row of logits, with transformers' filters in transformers' order:
//   temperature, top-k (ties with the k-th kept), top-p (smallest set whose probability reaches p),
//   min-p (at least p times the best token's probability), then a draw with Philox(seed, position)
//   that walks through the tokens that are left in the order of the vocabulary.
// temperature 0 is greedy: the first of the largest logits.
#pragma once

#include <vector>

#include "ops/rows.h"

namespace flexidepth {

// The filters of a draw as they lie in device memory, where a captured launch finds other ones each
// time.
struct SampleSettings {
  float temperature;
  float top_p;
  float min_p;
  int32_t top_k;
};

struct SampleArgs {
  Rows logits;  // [rows, vocab]; -inf excludes a token, NaN is an error
  int64_t vocab;
  float temperature;          // >= 0
  int64_t top_k;              // 0 = off
  float top_p;                // (0, 1]; 1 = off
  float min_p;                // [0, 1]; 0 = off
  const uint64_t* seeds;      // [rows]
  const int64_t* positions;   // [rows]: counter of the draw
  int32_t* tokens;            // [rows]
  float* logprobs;            // [rows]: log-softmax of the logits as given, at the chosen token
  int32_t* faults = nullptr;  // CUDA: [rows], a SampleFault each; the CPU throws
  const SampleSettings* settings_at = nullptr;  // CUDA: in device memory; null = the four above
  void* room = nullptr;  // CUDA: sample_room_bytes(rows), 0 before its first use
  bool together = true;  // CUDA: several blocks may draw from a row, which wait for each other
};

enum SampleFault : int32_t { kSampled = 0, kNanLogit = 1, kNoFiniteLogit = 2 };

namespace cpu {
void sample(const SampleArgs& args, const Context& context);
}
namespace cuda {
size_t sample_room_bytes(int64_t rows);
void sample(const SampleArgs& args, const Context& context);
}  // namespace cuda

}  // namespace flexidepth
