#include <algorithm>

#include "core/check.h"
#include "cuda/attention_parts.cuh"
#include "cuda/compact.cuh"
#include "cuda/persistent.cuh"
#include "cuda/router.cuh"

namespace flexidepth::cuda {

namespace {

// Between two of them is a barrier of the grid.
enum class Phase {
  kProject,  // router code, queries, keys and values
  kMix,      // gates; attention, and the first half of the adapter
  kJoin,     // the attention's output and the second half of the adapter, into the residual stream
  kExpand,   // the two halves of the feed-forward
  kReduce,
  kLogits,
  kEnd,
};

// A block on its way through the pass. Which phases there are, every block finds alike.
template <class T, int M>
class Walk {
 public:
  __device__ Walk(const PersistentArgs& args, float* shared, PersistentState& state)
      : args_(args), shared_(shared), state_(state) {}

  __device__ void run() {
    begin();
    Phase phase = Phase::kProject;
    meet(phase, false);
    for (;;) {
      work(phase);
      const Phase next = behind(phase);
      if (next == Phase::kEnd) return;
      meet(next, phase == Phase::kProject);
      phase = next;
    }
  }

 private:
  static constexpr int kPairs = matvec_pairs(M);
  // Two would not fit the registers with one row, of which blocks leave room for three, or in
  // float32.
  static constexpr int kTokensAhead = M == 1 || sizeof(T) == 4 ? 1 : 2;

  __device__ const LayerWeights& layer() const { return state_.layers[index_ % 2]; }
  __device__ bool routed() const { return !args_.dense && layer().routed_index >= 0; }
  __device__ const RowList& running() const { return routed() ? state_.running : state_.all; }

  // The residual stream's start, the angles, and what the block has to know.
  __device__ void begin() {
    const int64_t d = args_.embedding.k, half = args_.pages.layout.head_dim / 2;
    const int64_t own = dev::block() * kMatvecThreads + dev::thread();
    const int64_t threads = dev::blocks() * kMatvecThreads;
    for (int64_t at = own; at < args_.rows * d; at += threads)
      args_.h[at] = to_float(weight_row<T>(args_.embedding, args_.token_ids[at / d])[at % d]);
    const RopeTableArgs angles{args_.positions, args_.inv_freq, args_.cos_sin, args_.rows,
                               args_.pages.layout.head_dim};
    for (int64_t at = own; at < args_.rows * half; at += threads)
      rope_entry(angles, at / half, at % half);
    fetch_layer(0);
    if (dev::thread() == 0) {
      state_.lm_head = args_.lm_head;
      state_.all.count = static_cast<int32_t>(args_.rows);
      state_.logits.count = static_cast<int32_t>(args_.num_logits);
    }
    const int i = dev::thread();
    if (i < args_.rows) {
      state_.all.number[i] = i;
      state_.all.scale[i] = 1.0f;
    }
    if (i < args_.num_logits)
      state_.logits.number[i] = args_.logits_rows == nullptr ? i : args_.logits_rows[i];
  }

  __device__ void fetch_layer(int64_t index) {
    static_assert(sizeof(LayerWeights) % sizeof(uint64_t) == 0);
    if (index >= args_.num_layers) return;
    const auto* from = reinterpret_cast<const uint64_t*>(args_.layers + index);
    auto* to = reinterpret_cast<uint64_t*>(&state_.layers[index % 2]);
    for (size_t i = static_cast<size_t>(dev::thread()); i < sizeof(LayerWeights) / sizeof *to;
         i += kMatvecThreads)
      to[i] = from[i];
  }

  // What comes after a phase. No row runs a layer: its blocks go on at once.
  __device__ Phase behind(Phase phase) {
    if (phase == Phase::kProject) return Phase::kMix;
    if (phase == Phase::kMix) return Phase::kJoin;
    if (phase == Phase::kJoin && running().count > 0) return Phase::kExpand;
    if (phase == Phase::kExpand) return Phase::kReduce;
    if (phase == Phase::kLogits) return Phase::kEnd;
    if (++index_ < args_.num_layers) return Phase::kProject;
    return args_.num_logits > 0 ? Phase::kLogits : Phase::kEnd;
  }

  // The barrier before a phase. While others are waited for, weights come closer.
  __device__ void meet(Phase next, bool fetch) {
    const uint32_t before = dev::arrive_at_grid(args_.barrier);
    if (fetch) fetch_layer(index_ + 1);
    if (dev::thread() == 0) describe(next);
    dev::sync_block();
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const Product& p = state_.products[which];
      // Whom the adapter is for, nobody knows yet; it is small.
      if (p.rows == nullptr || (next != Phase::kMix && p.rows->count == 0)) continue;
      prefetch_first<T, kPairs>(input(p), ProductOp<T>{p, args_}, dev::block());
    }
    dev::wait_for_grid(args_.barrier, before);
  }

  __device__ void work(Phase phase) {
    int64_t taken = 0;  // the phase's tasks so far: blocks take them in turn
    if (phase == Phase::kMix) {
      if (routed()) decide();
      taken = args_.pages.layout.head_dim <= 64 ? attend<8>() : attend<16>();
    }
#pragma unroll 1
    for (int which = 0; which < (sizeof(T) == sizeof(float) ? 3 : 2); ++which)
      taken = multiply<T>(state_.products[which], taken);
    if constexpr (sizeof(T) < sizeof(float)) multiply<float>(state_.products[2], taken);
  }

  // The products of a phase, by one thread.
  __device__ void describe(Phase phase) {
    const LayerWeights& w = layer();
    Product* p = state_.products;
    p[0].rows = p[1].rows = p[2].rows = nullptr;
    switch (phase) {
      case Phase::kProject:
        put(p[0], ProductKind::kProject, state_.all, args_.h, w.input_norm, args_.q, w.q);
        p[0].second = &w.k;
        p[0].third = &w.v;
        p[0].layer = index_;
        if (routed())
          put(p[2], ProductKind::kStore, state_.all, args_.h, w.input_norm, args_.encoded,
              w.router.enc);
        break;
      case Phase::kMix:
        if (routed()) put_gated(p[0], state_.skipped, w.adapter_gate, w.adapter_up);
        break;
      case Phase::kJoin:
        put(p[0], ProductKind::kAdd, running(), args_.attention, nullptr, args_.h, w.o);
        p[0].scaled = false;
        if (routed()) put_down(p[1], state_.skipped, w.adapter_down);
        break;
      case Phase::kExpand:
        put_gated(p[0], running(), w.gate, w.up);
        break;
      case Phase::kReduce:
        put_down(p[0], running(), w.down);
        break;
      case Phase::kLogits:
        put(p[0], ProductKind::kStore, state_.logits, args_.h, args_.final_norm, args_.logits,
            state_.lm_head);
        p[0].renumber = true;
        break;
      case Phase::kEnd:
        break;
    }
  }

  __device__ void put(Product& p, ProductKind kind, const RowList& rows, const float* x,
                      const float* norm, float* y, const PackedMatrix& w) const {
    p.kind = kind;
    p.renumber = false;
    p.scaled = true;
    p.rows = &rows;
    p.x = x;
    p.norm = norm;
    p.y = y;
    p.w = &w;
  }
  __device__ void put_gated(Product& p, const RowList& rows, const PackedMatrix& gate,
                            const PackedMatrix& up) const {
    put(p, ProductKind::kGated, rows, args_.h, layer().post_attention_norm, args_.activation, gate);
    p.second = &up;
  }
  __device__ void put_down(Product& p, const RowList& rows, const PackedMatrix& down) const {
    put(p, ProductKind::kAdd, rows, args_.activation, nullptr, args_.h, down);
  }

  __device__ Input input(const Product& p) const { return {{}, p.w->k, p.norm, args_.eps}; }

  // The block's share of a product; taken: tasks of the phase before it. Returns these with its
  // own.
  template <class U>
  __device__ int64_t multiply(const Product& p, int64_t taken) {
    if (p.rows == nullptr || p.rows->count == 0) return taken;
    const ProductOp<U> op{p, args_};
    const int64_t tasks = matvec_blocks(op.units(), kPairs);
    const int64_t task = first_task(taken);
    if (task >= tasks) return taken + tasks;
    const Input in = input(p);
    const int32_t count = p.rows->count;
    dev::sync_block();  // what was in shared memory has been read
    find_rows<M>(in, count, [&](int m) { return p.x + p.rows->number[m] * in.k; }, shared_);
    multiply_in_turn<U, M, kPairs>(in, 0, count, op, shared_, task, dev::blocks());
    return taken + tasks;
  }

  __device__ int64_t first_task(int64_t taken) const {
    const int64_t blocks = dev::blocks(), behind = dev::block() - taken % blocks;
    return behind < 0 ? behind + blocks : behind;
  }

  // Every block computes all gates; the first one writes them and the decisions down.
  __device__ void decide() {
    const LayerWeights& w = layer();
    const int64_t routed = args_.num_routed, j = w.routed_index;
    RouterGateArgs gate{};
    gate.router_dim = args_.router_dim;
    gate.norm = w.router.norm;
    gate.folded = w.router.folded;
    gate.bias = w.router.bias;
    gate.eps = args_.eps;
    gate.order = args_.order;
    for (int64_t i = dev::thread() / kWarp; i < args_.rows; i += kMatvecWarps) {
      const float own = folded_gate(gate, args_.encoded + i * args_.router_dim);
      if (dev::thread() % kWarp == 0) state_.gates[i] = own;
    }
    dev::sync_block();
    if (dev::thread() == 0) {
      CompactArgs compact{};
      compact.forced = args_.forced == nullptr ? nullptr : args_.forced + j;
      compact.forced_stride = routed;
      compact.threshold_at = args_.thresholds + j;
      state_.running.count = state_.skipped.count = 0;
      for (int32_t i = 0; i < args_.rows; ++i) {
        const float own = state_.gates[i];
        const bool runs = row_runs(compact, i, own);
        RowList& list = runs ? state_.running : state_.skipped;
        list.number[list.count] = i;
        list.scale[list.count++] = args_.unit_scales ? 1.0f : runs ? own : 1.0f - own;
        if (dev::block() != 0) continue;
        args_.gates[i * routed + j] = own;
        args_.ran[i * routed + j] = runs ? 1 : 0;
      }
    }
    dev::sync_block();
  }

  // The block's share of the attention of the rows that run, L lanes a token. Returns the number of
  // tasks.
  template <int L>
  __device__ int64_t attend() {
    const KvLayout& layout = args_.pages.layout;
    const int64_t width = args_.num_heads * layout.head_dim;
    const AttentionArgs attention{pages_of_layer<T>(args_.pages, index_),
                                  {args_.q, width, nullptr, args_.rows, nullptr},
                                  {args_.attention, width, nullptr, args_.rows, nullptr},
                                  args_.num_heads,
                                  args_.positions,
                                  args_.sequences,
                                  nullptr,
                                  args_.sliding_window,
                                  args_.attention_scale,
                                  args_.partials,
                                  args_.max_pages,
                                  args_.counters,
                                  false};
    const RowList& rows = running();
    const int most = static_cast<int>(most_parts(args_.max_pages));
    const int head_parts_of_row =
        static_cast<int>(layout.num_kv_heads * head_parts(args_.num_heads, layout.num_kv_heads));
    const int tasks = rows.count * head_parts_of_row * most;
    for (int task = static_cast<int>(dev::block()); task < tasks;
         task += static_cast<int>(dev::blocks())) {
      const int nth = task % most, of = task / most;
      const ContextPart<T, L, kTokensAhead> part(attention, rows.number[of / head_parts_of_row],
                                                 of % head_parts_of_row, nth);
      if (nth >= part.num_parts) continue;
      dev::sync_block();  // what was in shared memory has been read
      part.compute(shared_);
      dev::sync_block();
      part.finish(shared_);
    }
    return tasks;
  }

  const PersistentArgs& args_;
  float* shared_;
  PersistentState& state_;
  int index_ = 0;  // of the layer
};

// Blocks of a multiprocessor that registers must leave room for: all phases share them, and the
// fewer blocks there are, the sooner all have come to a barrier.
constexpr int persistent_resident(int m) { return m == 1 ? 3 : 2; }

template <class T, int M>
__global__ void __launch_bounds__(kMatvecThreads, persistent_resident(M))
    persistent_kernel(const __grid_constant__ PersistentArgs args, const int64_t state_at) {
  static_assert(kMatvecThreads == kAttentionThreads);
  dev::await_inputs();
  auto* shared = dev::shared_memory<float>();
  Walk<T, M>(args, shared, *reinterpret_cast<PersistentState*>(shared + state_at)).run();
}

template <class T, int M>
void launch_pass(const PersistentArgs& args, const Context& context) {
  const KvLayout& layout = args.pages.layout;
  const int64_t inputs = std::max({args.embedding.k, args.num_heads * layout.head_dim,
                                   args.intermediate_size, args.adapter_dim});
  const size_t phase =
      std::max(matvec_shared_bytes<M>(inputs), attention_shared_bytes(layout.head_dim));
  const int64_t state_at = ceil_div(static_cast<int64_t>(phase), sizeof(Chunk)) *
                           static_cast<int64_t>(sizeof(Chunk) / sizeof(float));
  launch_resident("persistent_pass", persistent_kernel<T, M>, kMatvecThreads,
                  static_cast<size_t>(state_at) * sizeof(float) + sizeof(PersistentState), context,
                  args, state_at);
}

}  // namespace

void persistent_pass(const PersistentArgs& args, const Context& context) {
  const KvLayout& layout = args.pages.layout;
  check(args.rows >= 1 && args.rows <= kMaxPersistentRows && args.num_logits <= args.rows,
        ErrorKind::kUnsupported, "persistent_pass: ", args.rows, " rows and ", args.num_logits,
        " rows of logits; it takes 1 to ", kMaxPersistentRows, " rows");
  check(layout.head_dim % 8 == 0 && layout.head_dim <= 128, ErrorKind::kUnsupported,
        "persistent_pass: head_dim is ", layout.head_dim, "; wanted a multiple of 8 up to 128");
  check(layout.dtype == args.embedding.dtype, ErrorKind::kUnsupported,
        "persistent_pass: weights and cache have different types");
  with_type(layout.dtype, [&](auto type) {
    using T = decltype(type);
    with_rows<T>(args.rows,
                 [&](auto rows) { launch_pass<T, decltype(rows)::value>(args, context); });
  });
}

}  // namespace flexidepth::cuda
