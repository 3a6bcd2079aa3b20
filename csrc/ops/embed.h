// The residual stream's start: h[i] = W[token_ids[i]], float32.
#pragma once

#include "ops/rows.h"

namespace flexidepth {

struct EmbedArgs {
  const int32_t* token_ids;  // [rows], inside the vocabulary
  PackedMatrix weight;       // [vocab, d]
  MutableRows h;             // [rows, d]
};

namespace cuda {
void embed(const EmbedArgs& args, const Context& context);
}

}  // namespace flexidepth
