#include <algorithm>

#include "core/check.h"
#include "cuda/outputs.cuh"
#include "ops/routed_exit.h"

namespace flexidepth::cuda {

namespace {

// One MLP's second half.
template <class T>
struct Half {
  Input activation;
  Outputs<T> h;
};

template <class T>
struct Exit {
  Half<T> feed_forward;
  Half<T> adapter;
  int64_t feed_forward_blocks;
};

// One of the two as an Op.
template <class T>
struct HalfOf {
  const Exit<T>& exit;
  bool adapter;

  __device__ int64_t units() const {
    return adapter ? exit.adapter.h.units() : exit.feed_forward.h.units();
  }
  __device__ Pair<T> pair(int64_t unit) const {
    return adapter ? exit.adapter.h.pair(unit) : exit.feed_forward.h.pair(unit);
  }
  __device__ void store(int64_t unit, int64_t row, float ya, float yb) const {
    if (adapter) return exit.adapter.h.store(unit, row, ya, yb);
    exit.feed_forward.h.store(unit, row, ya, yb);
  }
};

// The first blocks are the feed-forward's, whose rows of weights are the longer ones.
template <class T, int M>
__global__ void __launch_bounds__(kMatvecThreads, matvec_resident(M))
    routed_exit_kernel(const Exit<T> exit) {
  dev::await_inputs();
  const HalfOf<T> op{exit, dev::block() >= exit.feed_forward_blocks};
  const Input in = op.adapter ? exit.adapter.activation : exit.feed_forward.activation;
  const int64_t live = live_rows(in.x);
  if (live == 0) return;  // the whole block: nothing takes this way
  constexpr int kPairs = matvec_pairs(M);
  const int64_t block = dev::block() - (op.adapter ? exit.feed_forward_blocks : 0);
  prefetch_first<T, kPairs>(in, op, block);
  const auto row_at = [&](int m) { return row_of(in.x, m); };
  matvec_of_live<T, M, kPairs>(in, 0, live, row_at, op, dev::shared_memory<float>(), block,
                               matvec_blocks(op.units(), kPairs));  // one task each
}

template <class T>
Half<T> half_of(const GatedMlpArgs& args) {
  const Rows activation{args.activation, args.down.k, nullptr, args.y.count, args.y.live};
  return {{activation, args.down.k, nullptr, 0.0f},
          {{args.down, args.h, true, args.scale}, nullptr}};
}

template <class T, int M>
void launch_exit(const RoutedExitArgs& args, const Context& context) {
  constexpr int kPairs = matvec_pairs(M);
  const auto blocks_of = [](const GatedMlpArgs& mlp) {
    return matvec_blocks(paired_units(mlp.down.n), kPairs);
  };
  const Exit<T> exit{half_of<T>(args.feed_forward), half_of<T>(args.adapter),
                     blocks_of(args.feed_forward)};
  const size_t bytes = std::max(matvec_shared_bytes<M>(args.feed_forward.down.k),
                                matvec_shared_bytes<M>(args.adapter.down.k));
  dev::launch("routed_exit", routed_exit_kernel<T, M>,
              grid_of(exit.feed_forward_blocks + blocks_of(args.adapter)), kMatvecThreads, bytes,
              context, exit);
}

}  // namespace

void routed_exit(const RoutedExitArgs& args, const Context& context) {
  const int64_t rows = args.feed_forward.y.count;
  if (rows == 0) return;
  check(rows <= kMatvecRows, ErrorKind::kValue, "routed_exit: ", rows, " rows; wanted at most ",
        kMatvecRows, "; use feed_forward and adapter");
  with_type(args.feed_forward.down.dtype, [&](auto type) {
    using T = decltype(type);
    with_rows<T>(rows, [&](auto m) { launch_exit<T, decltype(m)::value>(args, context); });
  });
}

}  // namespace flexidepth::cuda
