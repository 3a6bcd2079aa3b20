// One launch of a product for whatever type and number of rows: matvec.cuh up to 8 rows, tiles.cuh
// beyond where the weights allow it, else matvec.cuh 8 rows at a time.
//
// An Op is what matvec.cuh says.
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
  matvec_of_live<T, M, matvec_pairs(M)>(in, begin, live - begin, row_at, op,
                                        dev::shared_memory<float>(), dev::block(), dev::blocks());
}

// Blocks along x: as many as a device holds at once, which take tasks in turn. More would each look
// for their rows and stage the inputs anew, and where no row runs each would come to find that.
template <int M>
int64_t blocks_in_turn(const char* name, int64_t units, int64_t row_groups) {
  const int64_t tasks = matvec_blocks(units, matvec_pairs(M));
  const int64_t resident = matvec_resident(M) * dev::multiprocessors(name);
  return std::min(tasks, ceil_div(resident, row_groups));
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
    const int64_t row_groups = ceil_div(in.x.count, kRows);
    dev::launch(name, matvec_kernel<T, kRows, Op>,
                grid_of(blocks_in_turn<kRows>(name, units, row_groups), row_groups), kMatvecThreads,
                matvec_shared_bytes<kRows>(in.k), context, in, op);
  });
}

}  // namespace flexidepth::cuda
