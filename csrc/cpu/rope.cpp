#include "ops/rope.h"

#include <cmath>

#include "cpu/context.h"

namespace flexidepth::cpu {

void rope_table(const RopeTableArgs& args, const Context& context) {
  const int64_t half = args.head_dim / 2;
  // A sine costs some twenty times a multiplication: count it so when deciding about threads.
  for_rows(context, args.rows, args.head_dim * 20, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = args.cos_sin + i * args.head_dim;
      for (int64_t j = 0; j < half; ++j) {
        const float angle = static_cast<float>(args.positions[i]) * args.inv_freq[j];
        row[j] = std::cos(angle);
        row[half + j] = std::sin(angle);
      }
    }
  });
}

void rope(const RopeArgs& args, const Context& context) {
  const int64_t half = args.head_dim / 2;
  for_rows(context, args.x.count, args.num_heads * args.head_dim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* cos = args.cos_sin.row(i);
      const float* sin = cos + half;
      for (int64_t head = 0; head < args.num_heads; ++head) {
        float* a = args.x.row(i) + head * args.head_dim;
        float* b = a + half;
        for (int64_t j = 0; j < half; ++j) {
          const float first = a[j], second = b[j];
          a[j] = first * cos[j] - second * sin[j];
          b[j] = second * cos[j] + first * sin[j];
        }
      }
    }
  });
}

}  // namespace flexidepth::cpu
