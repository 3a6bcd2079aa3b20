#include "ops/linear.h"

#include "cpu/tiles.h"

namespace flexidepth::cpu {

namespace {

int64_t panels_in(const PackedMatrix& w) { return (w.n + kPanel - 1) / kPanel; }

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
  PanelMatrix matrices[kMaxLinearOutputs];
  int64_t ends[kMaxLinearOutputs];  // panels up to and including output i
  int64_t total = 0;
  for (int i = 0; i < args.num_outputs; ++i) {
    matrices[i] = panels_of(args.outputs[i].weight, context.kernels);
    ends[i] = total += panels_in(args.outputs[i].weight);
  }
  for_each_panel_block(
      context, args.x.count, total, [&](int64_t p, int count, int64_t row_begin, int64_t row_end) {
        // A group may straddle two outputs: cut it at the border.
        for (int i = 0; count > 0 && i < args.num_outputs; ++i) {
          if (p >= ends[i]) continue;
          const int64_t local = p - (i == 0 ? 0 : ends[i - 1]);
          int here = static_cast<int>(std::min<int64_t>(count, ends[i] - p));
          count -= here;
          p += here;
          for (int64_t q = local; here > 0;) {
            const int group = here >= 4 ? 4 : here >= 2 ? 2 : 1;
            for_each_tile(context.kernels, args.x, row_begin, row_end, matrices[i], q, group,
                          [&](int64_t m, int rows, const float* tile) {
                            write_tile(context.kernels, args.outputs[i], q, group, m, rows, tile);
                          });
            q += group;
            here -= group;
          }
        }
      });
}

}  // namespace flexidepth::cpu
