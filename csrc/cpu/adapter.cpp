#include "ops/adapter.h"

namespace flexidepth::cpu {

void adapter(const AdapterArgs& args, const Context& context) { gated_mlp(args, context); }

}  // namespace flexidepth::cpu
