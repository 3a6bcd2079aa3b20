#include "ops/pack.h"

#include <atomic>
#include <cmath>

#include "cpu/tiles.h"

namespace flexidepth::cpu {

namespace {

float read(const void* source, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source)[i];
  const uint16_t bits = static_cast<const uint16_t*>(source)[i];
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : half_to_float(bits);
}

template <DType kSource, DType kPacked>
int64_t pack_panels(const PackArgs& args, int64_t begin, int64_t end) {
  int64_t bad = 0;
  const PackedMatrix matrix{args.packed, kPacked, args.rows, args.k, nullptr};
  for (int64_t panel = begin; panel < end; ++panel) {
    const Panels to = weight_panels(matrix, panel);
    for (int64_t lane = 0; lane < kPanel && panel * kPanel + lane < args.rows; ++lane) {
      const int64_t from = (panel * kPanel + lane) * args.k;
      for (int64_t i = 0; i < args.k; ++i) {
        const float value = read(args.source, kSource, from + i);
        bad += std::isfinite(value) ? 0 : 1;
        auto* step = const_cast<uint8_t*>(to.data) +
                     static_cast<size_t>(kPacked == DType::kFloat32 ? i : i / 2) * to.step;
        if (kPacked == DType::kFloat32) {
          reinterpret_cast<float*>(step)[lane] = value;
        } else {
          reinterpret_cast<uint16_t*>(step)[lane * 2 + i % 2] = float_to_bf16(value);
        }
      }
    }
  }
  return bad;
}

using PackPanels = int64_t (*)(const PackArgs&, int64_t, int64_t);

PackPanels packer(DType source, DType packed) {
  const bool wide = packed == DType::kFloat32;
  switch (source) {
    case DType::kFloat32:
      return wide ? pack_panels<DType::kFloat32, DType::kFloat32>
                  : pack_panels<DType::kFloat32, DType::kBFloat16>;
    case DType::kBFloat16:
      return wide ? pack_panels<DType::kBFloat16, DType::kFloat32>
                  : pack_panels<DType::kBFloat16, DType::kBFloat16>;
    default:
      return wide ? pack_panels<DType::kFloat16, DType::kFloat32>
                  : pack_panels<DType::kFloat16, DType::kBFloat16>;
  }
}

}  // namespace

size_t packed_bytes(DType dtype, int64_t n, int64_t k) {
  return static_cast<size_t>((n + kPanel - 1) / kPanel) * panel_bytes(dtype, k);
}

int64_t pack(const PackArgs& args, const Context& context) {
  std::atomic<int64_t> bad{0};
  const PackPanels function = packer(args.source_dtype, args.packed_dtype);
  context.pool.run((args.rows + kPanel - 1) / kPanel, 4,
                   [&](int64_t begin, int64_t end) { bad += function(args, begin, end); });
  return bad;
}

void unpack_row(const PackedMatrix& matrix, int64_t row, float* out) {
  const Panels panel = weight_panels(matrix, row / kPanel);
  const int64_t lane = row % kPanel;
  for (int64_t i = 0; i < matrix.k; ++i) {
    if (matrix.dtype == DType::kFloat32) {
      out[i] =
          reinterpret_cast<const float*>(panel.data + static_cast<size_t>(i) * panel.step)[lane];
    } else {
      const auto* step = panel.data + static_cast<size_t>(i / 2) * panel.step;
      out[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(step)[lane * 2 + i % 2]);
    }
  }
}

}  // namespace flexidepth::cpu
