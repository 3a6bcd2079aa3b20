#include "ops/linear.h"

#include "cpu/tiles.h"

namespace flexidepth::cpu {

namespace {

void write_tile(const Kernels& kernels, const LinearOutput& out, int64_t panel, int count,
                int64_t first_row, int rows, const float* tile) {
  const int64_t column = panel * kPanel;
  const int width = static_cast<int>(std::min<int64_t>(count * kPanel, out.weight.n - column));
  const float* bias = out.weight.bias == nullptr ? nullptr : out.weight.bias + column;
  for (int i = 0; i < rows; ++i) {
    const float* from = tile + i * count * kPanel;
    float* to = out.y.row(first_row + i) + column;
    if (out.accumulate) {
      kernels.accumulate_row(from, bias, out.scale == nullptr ? 1.0f : out.scale[first_row + i], to,
                             width);
    } else {
      kernels.store_row(from, bias, to, width);
    }
  }
}

}  // namespace

void linear(const LinearArgs& args, const Context& context) {
  const Kernels& kernels = context.kernels;
  int64_t panels[kMaxLinearOutputs];
  for (int i = 0; i < args.num_outputs; ++i) panels[i] = panels_in(args.outputs[i].weight);
  for_each_panel_block(context, args.x.count, panels, args.num_outputs,
                       [&](int i, int64_t begin, int64_t end, int64_t row_begin, int64_t row_end) {
                         const LinearOutput& out = args.outputs[i];
                         for_each_panel_group(
                             kernels, row_end - row_begin, begin, end, [&](int64_t p, int count) {
                               for_each_tile(kernels, args.x, row_begin, row_end, out.weight, p,
                                             count, [&](int64_t m, int rows, const float* tile) {
                                               write_tile(kernels, out, p, count, m, rows, tile);
                                             });
                             });
                       });
}

}  // namespace flexidepth::cpu
