#include "core/check.h"
#include "cuda/compact.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/products.cuh"
#include "cuda/router.cuh"
#include "ops/project.h"

namespace flexidepth::cuda {

namespace {

// What a block of a call with `route` knows of its rows, in shared memory.
struct Decisions {
  float gates[kMaxRouteRows];
  int32_t list[kMaxRouteRows];  // the running rows
  int32_t run;
};

template <class T>
struct Projection {
  ProjectArgs args;
  int64_t decisions_at;  // floats from the beginning of shared memory; -1 = no route

  __device__ int64_t first_units() const {
    return args.rotate_first ? args.first.n / 2 : paired_units(args.first.n);
  }
  __device__ int64_t units() const { return first_units() + args.k.n / 2 + paired_units(args.v.n); }

  // A rotated pair stands half a head apart.
  __device__ int64_t rotated_output(int64_t unit) const {
    const int64_t half = args.head_dim / 2;
    return unit / half * args.head_dim + unit % half;
  }

  __device__ Pair<T> rotated_pair(const PackedMatrix& w, int64_t unit) const {
    const int64_t n = rotated_output(unit);
    return {weight_row<T>(w, n), weight_row<T>(w, n + args.head_dim / 2)};
  }

  __device__ Pair<T> pair(int64_t unit) const {
    if (unit < first_units())
      return args.rotate_first ? rotated_pair(args.first, unit) : paired_rows<T>(args.first, unit);
    unit -= first_units();
    if (unit < args.k.n / 2) return rotated_pair(args.k, unit);
    return paired_rows<T>(args.v, unit - args.k.n / 2);
  }

  // Number of the batch's row that the call's row i is.
  __device__ int64_t batch_row(int64_t i) const {
    if (decisions_at < 0) return row_number(args.h, i);
    return reinterpret_cast<const Decisions*>(dev::shared_memory<float>() + decisions_at)->list[i];
  }

  __device__ void rotate(int64_t i, int64_t unit, float& a, float& b) const {
    const int64_t half = args.head_dim / 2, j = unit % half;
    const float* table = args.cos_sin.base + batch_row(i) * args.cos_sin.stride;
    const float c = table[j], s = table[half + j], before = a;
    a = before * c - b * s;
    b = b * c + before * s;
  }

  __device__ void store(int64_t unit, int64_t i, float ya, float yb) const {
    if (unit >= first_units()) return store_cached(unit - first_units(), i, ya, yb);
    const PackedMatrix& w = args.first;
    float* y = row_of(args.first_out, i);
    const int64_t n = args.rotate_first ? rotated_output(unit) : paired_output(unit);
    const int64_t other = n + (args.rotate_first ? args.head_dim / 2 : 8);
    ya += bias_of(w, n);
    if (other < w.n) yb += bias_of(w, other);
    if (args.rotate_first) rotate(i, unit, ya, yb);
    y[n] = ya;
    if (other < w.n) y[other] = yb;
  }

  __device__ void store_cached(int64_t unit, int64_t i, float ya, float yb) const {
    if (unit < args.k.n / 2) {
      const int64_t n = rotated_output(unit), other = n + args.head_dim / 2;
      ya += bias_of(args.k, n);
      yb += bias_of(args.k, other);
      rotate(i, unit, ya, yb);
      cache(i, n, ya, 0);
      cache(i, other, yb, 0);
    } else {
      const int64_t n = paired_output(unit - args.k.n / 2);
      cache(i, n, ya + bias_of(args.v, n), value_offset(args.pages.layout));
      if (n + 8 < args.v.n)
        cache(i, n + 8, yb + bias_of(args.v, n + 8), value_offset(args.pages.layout));
    }
  }

  // Output n of the keys, or, value_offset behind them, of the values.
  __device__ void cache(int64_t i, int64_t n, float value, int64_t offset) const {
    const KvLayout& layout = args.pages.layout;
    const int64_t row = batch_row(i), position = args.positions[row];
    const int64_t at =
        key_offset(layout, n / args.head_dim, position % kPageTokens) + n % args.head_dim + offset;
    const int32_t sequence = args.sequences[row];
    const int64_t page = position / kPageTokens;
    switch (layout.dtype) {
      case DType::kFloat32:
        layer_of_page<float>(args.pages, sequence, page)[at] = value;
        break;
      case DType::kBFloat16:
        layer_of_page<BFloat16>(args.pages, sequence, page)[at] = cached<BFloat16>(value);
        break;
      case DType::kFloat16:
        layer_of_page<Float16>(args.pages, sequence, page)[at] = cached<Float16>(value);
        break;
    }
  }
};

// Every block computes all gates; the first one writes them and the decisions down.
__device__ void decide(const RouteArgs& route, Decisions& decisions) {
  const CompactArgs& compact = route.compact;
  for (int64_t i = dev::thread() / kWarp; i < compact.rows; i += kMatvecWarps) {
    const float gate = folded_gate(route.gate, row_of(route.gate.encoded, i));
    if (dev::thread() % kWarp == 0) decisions.gates[i] = gate;
  }
  dev::sync_block();
  if (dev::thread() == 0) {
    const bool writes = dev::block() == 0;
    int32_t run = 0;
    for (int32_t i = 0; i < compact.rows; ++i) {
      const float gate = decisions.gates[i];
      const bool runs = row_runs(compact, i, gate);
      if (writes) {
        route.gate.gates[i * route.gate.gate_stride] = gate;
        write_decision(compact, i, gate, runs, runs ? run : i - run);
      }
      if (runs) decisions.list[run++] = i;
    }
    decisions.run = run;
    if (writes) {
      compact.counts[0] = run;
      compact.counts[1] = static_cast<int32_t>(compact.rows) - run;
    }
  }
  dev::sync_block();
}

template <class T, int M>
__global__ void __launch_bounds__(kMatvecThreads, matvec_resident(M))
    route_kernel(const Input in, const Projection<T> op, const RouteArgs route) {
  dev::await_inputs();
  auto* shared = dev::shared_memory<float>();
  auto& decisions = *reinterpret_cast<Decisions*>(shared + op.decisions_at);
  decide(route, decisions);
  if (decisions.run == 0) return;
  const auto row_at = [&](int m) { return in.x.base + decisions.list[m] * in.x.stride; };
  matvec<T, M, matvec_pairs(M)>(in, 0, decisions.run, row_at, op, shared, dev::block());
}

template <class T>
void run_routed(const ProjectArgs& args, const Input& in, int64_t units, const Context& context) {
  check(args.h.count <= kMaxRouteRows && args.h.index == nullptr, ErrorKind::kValue,
        "project: ", args.h.count, " rows that are routed on the way; wanted at most ",
        kMaxRouteRows, ", not listed; use router_gate and compact before it");
  with_rows<T>(args.h.count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const size_t bytes = matvec_shared_bytes<kRows>(in.k);
    const Projection<T> op{args, static_cast<int64_t>(bytes / sizeof(float))};
    dev::launch("project", route_kernel<T, kRows>,
                grid_of(matvec_blocks(units, matvec_pairs(kRows))), kMatvecThreads,
                bytes + sizeof(Decisions), context, in, op, *args.route);
  });
}

// The router's code out of a float32 matrix, keys and values out of another type's: the first
// `code_blocks` blocks take the former, the others the latter.
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
  if (args.h.count > kMatvecRows) {
    run_product<float>("project", in, code, code_units, context);
    run_product<T>("project", in, cached, cached_units, context);
    return;
  }
  with_rows<T>(args.h.count, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const int64_t code_blocks = matvec_blocks(code_units, matvec_pairs(kRows));
    const int64_t blocks = code_blocks + matvec_blocks(cached_units, matvec_pairs(kRows));
    dev::launch("project", mixed_kernel<T, kRows>, grid_of(blocks), kMatvecThreads,
                matvec_shared_bytes<kRows>(in.k), context, in, code, cached, code_blocks);
  });
}

}  // namespace

void project(const ProjectArgs& args, const Context& context) {
  if (args.h.count == 0) return;
  const PackedMatrix& any = args.first.n > 0 ? args.first : args.k;
  const Input in{args.h, any.k, args.norm, args.eps};
  const int64_t units = (args.rotate_first ? args.first.n / 2 : paired_units(args.first.n)) +
                        args.k.n / 2 + paired_units(args.v.n);
  const bool mixed = args.first.n > 0 && args.k.n > 0 && args.first.dtype != args.k.dtype;
  check(
      !mixed || (args.first.dtype == DType::kFloat32 && !args.rotate_first),
      ErrorKind::kUnsupported,
      "project: the first matrix is of another type than keys and values; wanted the same, or the "
      "router's in float32");
  with_type(mixed ? args.k.dtype : any.dtype, [&](auto type) {
    using T = decltype(type);
    if (mixed) {
      run_mixed<T>(args, in, context);
    } else if (args.route != nullptr) {
      run_routed<T>(args, in, units, context);
    } else {
      run_product<T>("project", in, Projection<T>{args, -1}, units, context);
    }
  });
}

}  // namespace flexidepth::cuda
