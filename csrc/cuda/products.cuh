// One launch of a product for whatever type and number of rows: matvec.cuh up to 8 rows, tiles.cuh
// beyond where the weights allow it, else matvec.cuh 8 rows at a time.
//
// An Op is what matvec.cuh says, and whether fewer rows than were launched for are often all there
// are: bool kOftenFew.
#pragma once

#include <algorithm>

#include "cuda/matvec.cuh"
#include "cuda/tiles.cuh"

namespace flexidepth::cuda {

template <class T, int M, class Op>
__global__ void __launch_bounds__(kMatvecThreads, matvec_resident(M))
    matvec_kernel(const Input in, const Op op) {
  // Before it is known whether anything runs, nothing is asked for.
  if (in.x.live == nullptr) prefetch_first<T, matvec_pairs(M)>(in, op, dev::block());
  dev::await_inputs();
  const int64_t begin = dev::block(1) * M, live = live_rows(in.x);
  if (begin >= live) return;  // the whole block: nothing runs
  if (in.x.live != nullptr) prefetch_first<T, matvec_pairs(M)>(in, op, dev::block());
  const auto row_at = [&](int m) { return row_of(in.x, begin + m); };
  constexpr int kPairs = matvec_pairs(M);
  auto* shared = dev::shared_memory<float>();
  if constexpr (Op::kOftenFew) {
    matvec_of_live<T, M, kPairs>(in, begin, live - begin, row_at, op, shared, dev::block(),
                                 dev::blocks());
  } else {
    matvec<T, M, kPairs>(in, begin, live - begin, row_at, op, shared, dev::block(), dev::blocks());
  }
}

template <class T, class Op>
__global__ void __launch_bounds__(kTileThreads, 4) tile_kernel(const Input in, const Op op) {
  dev::await_inputs();
  const int64_t begin = dev::block(1) * kTileRows;
  if (begin >= live_rows(in.x)) return;
  tile_product<T>(in, begin, op, dev::shared_memory<unsigned char>());
}

template <class T, class Op>
void run_product(const char* name, const Input& in, const Op& op, int64_t units,
                 const Context& context) {
  if (in.x.count == 0 || units == 0) return;
  if constexpr (sizeof(T) == 2) {
    if (in.x.count > kMatvecRows && tiles_fit<T>(in.k)) {
      dev::launch(name, tile_kernel<T, Op>,
                  grid_of(ceil_div(units, kTileUnits), ceil_div(in.x.count, kTileRows)),
                  kTileThreads, kTileSharedBytes, context, in, op);
      return;
    }
  }
  with_rows<T>(in.x.count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const auto kernel = matvec_kernel<T, kRows, Op>;
    const size_t shared_bytes = matvec_shared_bytes<kRows>(in.k);
    const int64_t row_groups = ceil_div(in.x.count, kRows);
    // As many as the device holds at once take tasks in turn. More would each look for their rows
    // and stage the inputs anew, and where no row runs each would come to find that.
    const int64_t most = dev::blocks_at_once(name, kernel, kMatvecThreads, shared_bytes);
    const int64_t tasks = matvec_blocks(units, matvec_pairs(kRows));
    const int64_t blocks = std::clamp(most / row_groups, int64_t{1}, tasks);
    dev::launch(name, kernel, grid_of(blocks, row_groups), kMatvecThreads, shared_bytes, context,
                in, op);
  });
}

}  // namespace flexidepth::cuda
