#include "cuda/products.cuh"
#include "ops/gated_mlp.h"
#include "ops/linear.h"

namespace flexidepth::cuda {

namespace {

// A pair is one row of W_gate and the same of W_up.
template <class T>
struct Activation {
  PackedMatrix gate;
  PackedMatrix up;
  float* activation;  // [rows, width]

  __device__ int64_t units() const { return gate.n; }

  __device__ Pair<T> pair(int64_t unit) const {
    return {weight_row<T>(gate, unit), weight_row<T>(up, unit)};
  }

  __device__ void store(int64_t unit, int64_t row, float sum_gate, float sum_up) const {
    const float g = sum_gate + bias_of(gate, unit), u = sum_up + bias_of(up, unit);
    activation[row * gate.n + unit] = g / (1.0f + expf(-g)) * u;
  }
};

}  // namespace

void gated_mlp(const char* op, const GatedMlpArgs& args, const Context& context) {
  with_type(args.gate.dtype, [&](auto type) {
    using T = decltype(type);
    run_product<T>(op, Input{args.y, args.gate.k, args.norm, args.eps},
                   Activation<T>{args.gate, args.up, args.activation}, args.gate.n, context);
  });
  LinearArgs down;
  down.x = {args.activation, args.gate.n, nullptr, args.y.count, args.y.live};
  down.outputs[0] = {args.down, args.h, true, args.scale};
  linear(down, context);
}

}  // namespace flexidepth::cuda
