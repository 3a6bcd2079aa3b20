// What one forward pass takes and gives. Everything is host memory, owned by the caller.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/routing.h"

namespace flexidepth {

struct Batch {
  const int32_t* token_ids =
      nullptr;  // [rows]: new tokens of the first cache, then of the second, ...
  int64_t rows = 0;
  std::vector<int64_t> counts;  // rows of each cache
  std::vector<KvCache*> caches;
  Routing routing = Routing::kRouter;
  const uint8_t* mask = nullptr;         // [rows, num_routed], forced routing: nonzero = run
  const float* thresholds = nullptr;     // [num_routed]; null = the model's
  const int32_t* logits_rows = nullptr;  // [num_logits]
  int64_t num_logits = 0;
  float* logits = nullptr;  // [num_logits, vocab]
  float* gates = nullptr;   // [rows, num_routed]; NaN when dense
  uint8_t* ran = nullptr;   // [rows, num_routed]
};

}  // namespace flexidepth
