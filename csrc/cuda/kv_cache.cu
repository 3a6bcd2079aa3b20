#include "cuda/kv_cache.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace flexidepth::cuda {

namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(const KvAppendArgs args) {
  dev::await_inputs();
  const int64_t i = dev::block();
  if (i >= live_rows(args.k)) return;
  const KvLayout& layout = args.pages.layout;
  const int64_t position = args.positions[i], slot = position % kPageTokens;
  T* layer = layer_of_page<T>(args.pages, args.sequences[i], position / kPageTokens);
  const float* k = row_of(args.k, i);
  const float* v = row_of(args.v, i);
  for (int64_t j = dev::thread(); j < layout.num_kv_heads * layout.head_dim; j += kThreads) {
    const int64_t at = key_offset(layout, j / layout.head_dim, slot) + j % layout.head_dim;
    layer[at] = cached<T>(k[j]);
    layer[at + value_offset(layout)] = cached<T>(v[j]);
  }
}

}  // namespace

size_t kv_layer_bytes(const KvLayout& layout) {
  return static_cast<size_t>(2 * layout.num_kv_heads * kPageTokens * layout.head_dim) *
         size_of(layout.dtype);
}

void kv_append(const KvAppendArgs& args, const Context& context) {
  if (args.k.count == 0) return;
  with_type(args.pages.layout.dtype, [&](auto type) {
    dev::launch("kv_append", kv_append_kernel<decltype(type)>, grid_of(args.k.count), kThreads, 0,
                context, args);
  });
}

}  // namespace flexidepth::cuda
