#include "core/check.h"
#include "cuda/compact.cuh"
#include "cuda/gated_mlp.cuh"
#include "cuda/project.cuh"
#include "cuda/router.cuh"
#include "ops/routed_entry.h"

namespace flexidepth::cuda {

namespace {

// What a block that needs the decisions knows of them, in shared memory.
struct Decisions {
  int32_t running[kMaxRouteRows];  // numbers of rows, in ascending order
  int32_t skipped[kMaxRouteRows];
  int32_t run;
  float gates[kMaxRouteRows];
};

// By the whole block; one of them writes gates and decisions down.
__device__ void decide(const RouterGateArgs& gate, const CompactArgs& compact, bool writes,
                       Decisions& decisions) {
  for (int64_t i = dev::thread() / kWarp; i < compact.rows; i += kMatvecWarps) {
    const float own = folded_gate(gate, row_of(gate.encoded, i));
    if (dev::thread() % kWarp == 0) decisions.gates[i] = own;
  }
  dev::sync_block();
  if (dev::thread() == 0) {
    int32_t run = 0;
    for (int32_t i = 0; i < compact.rows; ++i) {
      const float own = decisions.gates[i];
      const bool runs = row_runs(compact, i, own);
      const int32_t place = runs ? run : i - run;
      (runs ? decisions.running : decisions.skipped)[place] = i;
      run += runs ? 1 : 0;
      if (!writes) continue;
      gate.gates[i * gate.gate_stride] = own;
      write_decision(compact, i, own, runs, place);
    }
    decisions.run = run;
    if (writes) {
      compact.counts[0] = run;
      compact.counts[1] = static_cast<int32_t>(compact.rows) - run;
    }
  }
  dev::sync_block();
}

// What a block computes. Keys and values come first in the grid since they are wanted whatever is
// decided, the queries last: there are most of them, and blocks that leave at once make room.
enum class Part { kCached, kAdapter, kQueries };

template <class T>
struct Entry {
  Projection<T> cached;
  Projection<T> queries;
  Activation<T> adapter;
  Input rows;                // of h, with the norm of cached and queries
  const float* second_norm;  // the adapter's
  float second_eps;
  RouterGateArgs gate;
  CompactArgs compact;
  int64_t cached_blocks;
  int64_t adapter_blocks;
  int64_t decisions_at;  // floats from the beginning of shared memory
};

// One part as an Op.
template <class T>
struct PartOf {
  const Entry<T>& entry;
  Part part;

  __device__ int64_t units() const {
    return part == Part::kCached    ? entry.cached.units()
           : part == Part::kAdapter ? entry.adapter.units()
                                    : entry.queries.units();
  }
  __device__ Pair<T> pair(int64_t unit) const {
    if (part == Part::kCached) return entry.cached.pair(unit);
    if (part == Part::kAdapter) return entry.adapter.pair(unit);
    return entry.queries.pair(unit);
  }
  __device__ void store(int64_t unit, int64_t row, float ya, float yb) const {
    if (part == Part::kCached) return entry.cached.store(unit, row, ya, yb);
    if (part == Part::kAdapter) return entry.adapter.store(unit, row, ya, yb);
    entry.queries.store(unit, row, ya, yb);
  }
};

template <class T, int M>
__global__ void __launch_bounds__(kMatvecThreads, matvec_resident(M))
    routed_entry_kernel(const Entry<T> entry) {
  constexpr int kPairs = matvec_pairs(M);
  const int64_t others = dev::block() - entry.cached_blocks;  // that need decisions
  const PartOf<T> op{entry, others < 0                      ? Part::kCached
                            : others < entry.adapter_blocks ? Part::kAdapter
                                                            : Part::kQueries};
  const bool skips = op.part == Part::kAdapter;
  const int64_t block = others < 0 ? dev::block() : skips ? others : others - entry.adapter_blocks;
  if (others < 0) {
    prefetch_first<T, kPairs>(entry.rows, op, block);
  } else if (dev::thread() < kWarp) {  // what the gate takes, which comes before all else
    const int64_t bytes = entry.gate.router_dim * static_cast<int64_t>(sizeof(float));
    dev::prefetch_by_warp(entry.gate.norm, bytes);
    dev::prefetch_by_warp(entry.gate.folded, bytes);
  }
  dev::await_inputs();
  auto* shared = dev::shared_memory<float>();
  const int32_t* list = nullptr;
  int64_t count = entry.rows.x.count;
  if (others >= 0) {
    auto& decisions = *reinterpret_cast<Decisions*>(shared + entry.decisions_at);
    decide(entry.gate, entry.compact, others == 0, decisions);
    list = skips ? decisions.skipped : decisions.running;
    count = skips ? count - decisions.run : decisions.run;
    if (count == 0) return;
    prefetch_first<T, kPairs>(entry.rows, op, block);
  }
  Input in = entry.rows;
  if (skips) {
    in.norm = entry.second_norm;
    in.eps = entry.second_eps;
  }
  const auto row_at = [&](int m) {
    return in.x.base + (list == nullptr ? m : list[m]) * in.x.stride;
  };
  find_rows<M>(in, count, row_at, shared);
  multiply_rows<T, M, kPairs>(in, 0, count, op, shared, block, false);
}

template <class T, int M>
void launch_entry(const RoutedEntryArgs& args, const Context& context) {
  const ProjectArgs& project = args.project;
  const size_t bytes = matvec_shared_bytes<M>(project.first.k);
  const auto decisions_at = static_cast<int64_t>(bytes / sizeof(float));
  Entry<T> entry{{project, -1},
                 {project, decisions_at},
                 {args.adapter.gate, args.adapter.up, args.adapter.activation},
                 {project.h, project.first.k, project.norm, project.eps},
                 args.adapter.norm,
                 args.adapter.eps,
                 args.gate,
                 args.compact,
                 0,
                 0,
                 decisions_at};
  entry.cached.args.first.n = 0;
  entry.queries.args.k.n = entry.queries.args.v.n = 0;
  constexpr int kPairs = matvec_pairs(M);
  const int64_t query_blocks = matvec_blocks(project.first.n / 2, kPairs);
  entry.cached_blocks = matvec_blocks(project.k.n / 2 + paired_units(project.v.n), kPairs);
  entry.adapter_blocks = matvec_blocks(args.adapter.gate.n, kPairs);
  dev::launch("routed_entry", routed_entry_kernel<T, M>,
              grid_of(entry.cached_blocks + entry.adapter_blocks + query_blocks), kMatvecThreads,
              bytes + sizeof(Decisions), context, entry);
}

}  // namespace

void routed_entry(const RoutedEntryArgs& args, const Context& context) {
  const Rows& h = args.project.h;
  if (h.count == 0) return;
  check(h.count <= kMaxRouteRows && h.index == nullptr && args.gate.folded != nullptr,
        ErrorKind::kValue, "routed_entry: ", h.count, h.index == nullptr ? "" : " listed",
        " rows and a ", args.gate.folded == nullptr ? "strict" : "folded",
        " router; wanted at most ", kMaxRouteRows,
        " rows, not listed, and a folded router; use project, router_gate and compact");
  with_type(args.project.first.dtype, [&](auto type) {
    using T = decltype(type);
    with_rows<T>(h.count,
                 [&](auto rows) { launch_entry<T, decltype(rows)::value>(args, context); });
  });
}

}  // namespace flexidepth::cuda
