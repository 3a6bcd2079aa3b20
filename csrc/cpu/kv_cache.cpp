#include "ops/kv_cache.h"

#include "cpu/context.h"

namespace flexidepth {

size_t KvLayout::key_panel_bytes() const { return cpu::panel_bytes(dtype, head_dim); }
size_t KvLayout::value_panel_bytes() const { return cpu::panel_bytes(dtype, kPageTokens); }

size_t KvLayout::key_offset(int64_t kv_head, int64_t block) const {
  return static_cast<size_t>(kv_head * (kPageTokens / cpu::kPanel) + block) * key_panel_bytes();
}

size_t KvLayout::value_offset(int64_t kv_head, int64_t panel) const {
  return key_offset(num_kv_heads, 0) +
         static_cast<size_t>(kv_head * value_panels() + panel) * value_panel_bytes();
}

size_t KvLayout::layer_bytes() const { return value_offset(num_kv_heads, 0); }

namespace cpu {

namespace {

// Element (k, lane) of a panel, see the layouts in cpu/kernels.h.
int64_t pair_index(int64_t k, int64_t lane) { return (k / 2 * kPanel + lane) * 2 + k % 2; }

template <class Element, class Convert, class Index>
void append_row(const KvLayout& layout, const float* k, const float* v, uint8_t* page, int64_t slot,
                const Convert& convert, const Index& index) {
  const int64_t dim = layout.head_dim;
  for (int64_t head = 0; head < layout.num_kv_heads; ++head) {
    auto* keys = reinterpret_cast<Element*>(page + layout.key_offset(head, slot / kPanel));
    for (int64_t i = 0; i < dim; ++i) keys[index(i, slot % kPanel)] = convert(k[head * dim + i]);
    for (int64_t panel = 0; panel < layout.value_panels(); ++panel) {
      auto* values = reinterpret_cast<Element*>(page + layout.value_offset(head, panel));
      for (int64_t lane = 0; lane < kPanel && panel * kPanel + lane < dim; ++lane)
        values[index(slot, lane)] = convert(v[head * dim + panel * kPanel + lane]);
    }
  }
}

}  // namespace

void kv_append(const KvAppendArgs& args, const Context& context) {
  const KvPages& pages = args.pages;
  const int64_t floats = 2 * pages.layout.num_kv_heads * pages.layout.head_dim;
  for_rows(context, args.k.count, floats, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t page = args.positions[i] / kPageTokens, slot = args.positions[i] % kPageTokens;
      uint8_t* layer = pages.tables[args.sequences[i]][page] + pages.layer_offset;
      if (pages.layout.dtype == DType::kFloat32) {
        append_row<float>(
            pages.layout, args.k.row(i), args.v.row(i), layer, slot, [](float x) { return x; },
            [](int64_t k, int64_t lane) { return k * kPanel + lane; });
      } else {
        append_row<uint16_t>(pages.layout, args.k.row(i), args.v.row(i), layer, slot, float_to_bf16,
                             pair_index);
      }
    }
  });
}

}  // namespace cpu
}  // namespace flexidepth
