#include "cuda/project.cuh"

namespace flexidepth::cuda {

namespace {

// Up to kMatvecRows rows. The router's code out of a float32 matrix, keys and values out of another
// type's: the first `code_blocks` blocks take the former, the others the latter.
template <class T, int M>
__global__ void __launch_bounds__(kMatvecThreads, matvec_resident(M))
    mixed_kernel(const Input in, const Projection<float> code, const Projection<T> cached,
                 const int64_t code_blocks) {
  constexpr int kPairs = matvec_pairs(M);
  if (dev::block() < code_blocks) {
    prefetch_first<float, kPairs>(in, code, dev::block());
  } else {
    prefetch_first<T, kPairs>(in, cached, dev::block() - code_blocks);
  }
  dev::await_inputs();
  const int64_t begin = dev::block(1) * M, live = live_rows(in.x);
  if (begin >= live) return;
  const auto row_at = [&](int m) { return row_of(in.x, begin + m); };
  auto* shared = dev::shared_memory<float>();
  if (dev::block() < code_blocks) {
    matvec<float, M, kPairs>(in, begin, live - begin, row_at, code, shared, dev::block());
  } else {
    matvec<T, M, kPairs>(in, begin, live - begin, row_at, cached, shared,
                         dev::block() - code_blocks);
  }
}

template <class T>
void run_mixed(const ProjectArgs& args, const Input& in, const Context& context) {
  Projection<float> code{args, -1};
  code.args.k.n = code.args.v.n = 0;
  Projection<T> cached{args, -1};
  cached.args.first.n = 0;
  const int64_t code_units = paired_units(args.first.n);
  const int64_t cached_units = args.k.n / 2 + paired_units(args.v.n);
  with_rows<T>(args.h.count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const int64_t code_blocks = matvec_blocks(code_units, matvec_pairs(kRows));
    const int64_t blocks = code_blocks + matvec_blocks(cached_units, matvec_pairs(kRows));
    dev::launch("project", mixed_kernel<T, kRows>, grid_of(blocks), kMatvecThreads,
                matvec_shared_bytes<kRows>(in.k), context, in, code, cached, code_blocks);
  });
}

}  // namespace

void project_mixed(const ProjectArgs& args, const Input& in, const Context& context) {
  with_type(args.k.dtype, [&](auto type) {
    using T = decltype(type);
    // Of float32 beside float32 nothing is mixed.
    if constexpr (sizeof(T) == 2) run_mixed<T>(args, in, context);
  });
}

}  // namespace flexidepth::cuda
