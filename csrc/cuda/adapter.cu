#include "ops/adapter.h"

namespace flexidepth::cuda {

void adapter(const AdapterArgs& args, const Context& context) {
  gated_mlp("adapter", args, context);
}

}  // namespace flexidepth::cuda
