#include "core/check.h"
#include "cuda/attention_parts.cuh"
#include "cuda/attention_tiles.cuh"

namespace flexidepth::cuda {

namespace {

template <class T, int L>
__global__ void __launch_bounds__(kAttentionThreads, 3) attention_kernel(const AttentionArgs args) {
  dev::await_inputs();
  if (dev::block(2) >= live_rows(args.q)) return;
  const ContextPart<T, L, 2> part(args, dev::block(2), dev::block(1), dev::block(0));
  if (dev::block(0) >= part.num_parts) return;
  auto* shared = dev::shared_memory<float>();
  part.compute(shared);
  dev::sync_block();
  part.finish(shared);
}

template <class T, int L>
void run(const AttentionArgs& args, const Context& context) {
  const KvLayout& layout = args.pages.layout;
  dev::launch(
      "attention", attention_kernel<T, L>,
      grid_of(most_parts(args.max_pages),
              layout.num_kv_heads * head_parts(args.num_heads, layout.num_kv_heads), args.q.count),
      kAttentionThreads, attention_shared_bytes(layout.head_dim), context, args);
}

template <class T, int D>
void run_tiles(const AttentionArgs& args, const Context& context) {
  dev::launch("attention", attention_tiles_kernel<T, D>,
              grid_of(ceil_div(args.q.count, kQueryRows), args.num_heads), kAttentionTileThreads,
              QueryTile<T, D>::kSharedBytes, context, args);
}

}  // namespace

size_t attention_scratch_floats(int64_t rows, int64_t num_heads, int64_t head_dim,
                                int64_t max_pages) {
  return static_cast<size_t>(rows * num_heads * most_parts(max_pages) *
                             (kPartialFloats + head_dim));
}

size_t attention_counters(int64_t rows, int64_t num_heads) {
  return static_cast<size_t>(rows * num_heads);
}

void attention(const AttentionArgs& args, const Context& context) {
  if (args.q.count == 0) return;
  const KvLayout& layout = args.pages.layout;
  check(layout.head_dim % 8 == 0 && layout.head_dim <= 128, ErrorKind::kUnsupported,
        "attention: head_dim is ", layout.head_dim, "; wanted a multiple of 8 up to 128");
  with_type(layout.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (args.prompt)
        return layout.head_dim <= 64 ? run_tiles<T, 64>(args, context)
                                     : run_tiles<T, 128>(args, context);
    }
    layout.head_dim <= 64 ? run<T, 8>(args, context) : run<T, 16>(args, context);
  });
}

}  // namespace flexidepth::cuda
