#include "core/check.h"
#include "cuda/outputs.cuh"
#include "ops/router_code.h"

namespace flexidepth::cuda {

namespace {

constexpr int64_t kWarpBytes = 32768;  // that a warp asks for
constexpr int64_t kBlockBytes = kMatvecWarps * kWarpBytes;

struct Pieces {
  Ahead piece[kMaxAhead];

  // What the block-th of the blocks that only ask has to ask for.
  __device__ void ask_for(int64_t block) const {
    Ahead own;
    int64_t begin = 0;
#pragma unroll
    for (int i = 0; i < kMaxAhead; ++i) {
      const int64_t blocks = ceil_div(piece[i].bytes, kBlockBytes);
      if (block >= 0 && block < blocks) {
        own = piece[i];
        begin = block * kBlockBytes;
      }
      block -= blocks;
    }
    begin += dev::thread() / kWarp * kWarpBytes;
    const int64_t left = own.bytes - begin;
    if (left > 0) dev::prefetch_by_warp(own.data + begin, left < kWarpBytes ? left : kWarpBytes);
  }
};

// The first blocks compute, a warp a pair of outputs whatever the number of rows: there are few,
// and the more warps share them the sooner their weights are read. Each warp begins with asking for
// all of its own. The blocks behind ask for what comes later, and leave.
template <int M>
__global__ void __launch_bounds__(kMatvecThreads, matvec_resident(M))
    router_code_kernel(const Input in, const Outputs<float> op, const Pieces ahead,
                       const int64_t code_blocks) {
  if (dev::block() >= code_blocks) {
    ahead.ask_for(dev::block() - code_blocks);
    return;
  }
  const int64_t unit = dev::block() * kMatvecWarps + dev::thread() / kWarp;
  if (unit < op.units()) {
    const Pair<float> pair = op.pair(unit);
    const int64_t bytes = in.k * static_cast<int64_t>(sizeof(float));
    if (pair.a != nullptr) dev::prefetch_by_warp(pair.a, bytes);
    if (pair.b != nullptr) dev::prefetch_by_warp(pair.b, bytes);
  }
  dev::await_inputs();
  const auto row_at = [&](int m) { return row_of(in.x, m); };
  matvec<float, M, 1>(in, 0, in.x.count, row_at, op, dev::shared_memory<float>(), dev::block(),
                      code_blocks);
}

}  // namespace

void router_code(const RouterCodeArgs& args, const Context& context) {
  if (args.h.count == 0) return;
  check(args.h.count <= kMatvecRows && args.enc.dtype == DType::kFloat32, ErrorKind::kValue,
        "router_code: ", args.h.count, " rows and a matrix of ", name_of(args.enc.dtype),
        "; wanted at most ", kMatvecRows, ", and float32; project takes others");
  const Input in{args.h, args.enc.k, args.norm, args.eps};
  const Outputs<float> op{{args.enc, args.encoded, false, nullptr}, nullptr};
  Pieces ahead;
  int64_t ahead_blocks = 0;
  for (int i = 0; i < kMaxAhead; ++i) {
    ahead.piece[i] = args.ahead[i];
    ahead_blocks += ceil_div(args.ahead[i].bytes, kBlockBytes);
  }
  const int64_t code_blocks = matvec_blocks(paired_units(args.enc.n), 1);
  with_few_rows(args.h.count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    dev::launch("router_code", router_code_kernel<kRows>, grid_of(code_blocks + ahead_blocks),
                kMatvecThreads, matvec_shared_bytes<kRows>(in.k), context, in, op, ahead,
                code_blocks);
  });
}

}  // namespace flexidepth::cuda
