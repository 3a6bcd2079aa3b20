#include "cuda/project.cuh"
#include "cuda/router.cuh"

namespace flexidepth::cuda {

namespace {

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

}  // namespace

void project_routed(const ProjectArgs& args, const Input& in, int64_t units,
                    const Context& context) {
  with_type(args.first.dtype,
            [&](auto type) { run_routed<decltype(type)>(args, in, units, context); });
}

}  // namespace flexidepth::cuda
