#include "ops/gated_mlp.h"

#include "cpu/tiles.h"
#include "ops/linear.h"

namespace flexidepth::cpu {

void gated_mlp(const GatedMlpArgs& args, const Context& context) {
  const Kernels& kernels = context.kernels;
  const PanelMatrix gate = panels_of(args.gate, kernels), up = panels_of(args.up, kernels);
  const int64_t width = args.gate.n;
  const int64_t rows = args.y.count;
  for_each_panel_block(
      context, rows, (width + kPanel - 1) / kPanel,
      [&](int64_t p, int count, int64_t row_begin, int64_t row_end) {
        const int64_t column = p * kPanel;
        const int n = static_cast<int>(std::min<int64_t>(count * kPanel, width - column));
        const float* gate_bias = args.gate.bias == nullptr ? nullptr : args.gate.bias + column;
        const float* up_bias = args.up.bias == nullptr ? nullptr : args.up.bias + column;
        for_each_tile(kernels, args.y, row_begin, row_end, gate, p, count,
                      [&](int64_t m, int tile_rows, const float* gate_tile) {
                        for_each_tile(kernels, args.y, m, m + tile_rows, up, p, count,
                                      [&](int64_t first, int up_rows, const float* up_tile) {
                                        for (int i = 0; i < up_rows; ++i) {
                                          const int64_t at = (first - m + i) * count * kPanel;
                                          kernels.silu_mul_row(
                                              gate_tile + at, gate_bias, up_tile + at, up_bias,
                                              args.activation + (first + i) * width + column, n);
                                        }
                                      });
                      });
      });
  LinearArgs down;
  down.x = {args.activation, width, nullptr, rows};
  down.outputs[0] = {args.down, args.h, true, args.scale};
  linear(down, context);
}

}  // namespace flexidepth::cpu
