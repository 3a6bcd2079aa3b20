#include "ops/gated_mlp.h"

#include "cpu/tiles.h"
#include "ops/linear.h"

namespace flexidepth::cpu {

namespace {

// act[m] = silu(gate tile) * (up tile) for one group of panels and some rows.
void activate(const GatedMlpArgs& args, const Kernels& kernels, int64_t p, int count,
              int64_t row_begin, int64_t row_end) {
  const int64_t width = args.gate.n, column = p * kPanel;
  const int n = static_cast<int>(std::min<int64_t>(count * kPanel, width - column));
  const float* gate_bias = args.gate.bias == nullptr ? nullptr : args.gate.bias + column;
  const float* up_bias = args.up.bias == nullptr ? nullptr : args.up.bias + column;
  for_each_tile(kernels, args.y, row_begin, row_end, args.gate, p, count,
                [&](int64_t m, int rows, const float* gate) {
                  for_each_tile(kernels, args.y, m, m + rows, args.up, p, count,
                                [&](int64_t first, int up_rows, const float* up) {
                                  for (int i = 0; i < up_rows; ++i) {
                                    const int64_t at = i * count * kPanel;
                                    kernels.silu_mul_row(
                                        gate + at, gate_bias, up + at, up_bias,
                                        args.activation + (first + i) * width + column, n);
                                  }
                                });
                });
}

}  // namespace

void gated_mlp(const GatedMlpArgs& args, const Context& context) {
  const int64_t rows = args.y.count, width = args.gate.n;
  const int64_t panels = panels_in(args.gate);
  for_each_panel_block(context, rows, &panels, 1,
                       [&](int, int64_t begin, int64_t end, int64_t row_begin, int64_t row_end) {
                         for_each_panel_group(context.kernels, row_end - row_begin, begin, end,
                                              [&](int64_t p, int count) {
                                                activate(args, context.kernels, p, count, row_begin,
                                                         row_end);
                                              });
                       });
  LinearArgs down;
  down.x = {args.activation, width, nullptr, rows};
  down.outputs[0] = {args.down, args.h, true, args.scale};
  linear(down, context);
}

}  // namespace flexidepth::cpu
