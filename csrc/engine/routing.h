// How a pass decides which routed layers run.
#pragma once

namespace flexidepth {

enum class Routing : int {
  kRouter = 0,      // gate > threshold
  kForced = 1,      // the mask decides, the model's own gates weigh
  kForcedHard = 2,  // the mask decides, weights are 1
  kDense = 3,       // every layer runs, routers are not evaluated
};

}  // namespace flexidepth
