#include "ops/router.h"

#include <cmath>
#include <vector>

#include "cpu/context.h"
#include "ops/linear.h"

namespace flexidepth::cpu {

namespace {

void norm(const RouterGateArgs& args, const Kernels& kernels, float* z) {
  const float mean = kernels.sum_squares(z, args.router_dim) / static_cast<float>(args.router_dim);
  kernels.scale_mul(z, 1.0f / std::sqrt(mean + args.eps), args.norm, z, args.router_dim);
}

float sigmoid(float logit) { return 1.0f / (1.0f + std::exp(-logit)); }

}  // namespace

void router_gate(const RouterGateArgs& args, const Context& context) {
  const Kernels& kernels = context.kernels;
  const int64_t rows = args.encoded.count;
  for_rows(context, rows, args.router_dim * 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* z = args.encoded.row(i);
      if (args.order == RouterOrder::kNormTanh) norm(args, kernels, z);
      kernels.tanh_row(z, z, args.router_dim);
      if (args.order == RouterOrder::kTanhNorm) norm(args, kernels, z);
      if (args.folded != nullptr)
        args.gates[i * args.gate_stride] =
            sigmoid(kernels.dot(z, args.folded, args.router_dim) + args.bias);
    }
  });
  if (args.folded != nullptr) return;
  LinearArgs decode;
  decode.x = {args.encoded.base, args.encoded.stride, args.encoded.index, rows};
  decode.outputs[0] = {args.dec, args.decoded, false, nullptr};
  linear(decode, context);
  for (int64_t i = 0; i < rows; ++i)
    args.gates[i * args.gate_stride] =
        sigmoid(kernels.dot(args.decoded.row(i), args.head, args.dec.n) + args.bias);
}

void fold_router(const float* dec, const float* head, int64_t hidden, int64_t router_dim,
                 float* folded) {
  std::vector<double> sum(static_cast<size_t>(router_dim), 0.0);
  for (int64_t i = 0; i < hidden; ++i)
    for (int64_t j = 0; j < router_dim; ++j)
      sum[static_cast<size_t>(j)] += static_cast<double>(head[i]) * dec[i * router_dim + j];
  for (int64_t j = 0; j < router_dim; ++j)
    folded[j] = static_cast<float>(sum[static_cast<size_t>(j)]);
}

}  // namespace flexidepth::cpu
