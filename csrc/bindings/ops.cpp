// Each op on raw pointers (integers from Tensor.data_ptr()); flexidepth_ext/ops.py checks and
// converts. Matrices are dense and row-major, vectors contiguous; 0 stands for "none" where a
// pointer is optional.
#include <pybind11/stl.h>

#include <vector>

#include "bindings/address.h"
#include "bindings/register.h"
#include "cpu/context.h"
#include "cpu/isa.h"
#include "engine/kv_cache.h"
#include "ops/adapter.h"
#include "ops/attention.h"
#include "ops/compact.h"
#include "ops/feed_forward.h"
#include "ops/linear.h"
#include "ops/lm_head.h"
#include "ops/pack.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/router.h"

namespace flexidepth::bindings {

namespace py = pybind11;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// Threads and kernels for ops that are called one by one.
struct OpContext {
  OpContext(int num_threads, const std::string& isa)
      : pool(num_threads),
        kernels(isa.empty() ? *cpu::default_kernels() : *cpu::kernels_for(isa)) {}
  cpu::Context get() { return {pool, kernels}; }
  cpu::ThreadPool pool;
  const cpu::Kernels& kernels;
};

PackedMatrix matrix(Address data, int dtype, int64_t n, int64_t k, Address bias) {
  return {at<const uint8_t>(data), static_cast<DType>(dtype), n, k, at<const float>(bias)};
}

int64_t pack(OpContext& c, Address source, int source_dtype, int64_t rows, int64_t k, Address out,
             int dtype) {
  return cpu::pack({at<const void>(source), static_cast<DType>(source_dtype), rows, k,
                    at<uint8_t>(out), static_cast<DType>(dtype)},
                   c.get());
}

void linear(OpContext& c, Address x, int64_t rows, Address x_index, Address weight, int dtype,
            int64_t n, int64_t k, Address bias, Address y, Address y_index, bool accumulate,
            Address scale) {
  LinearArgs args;
  args.x = {at<const float>(x), k, at<const int32_t>(x_index), rows};
  args.outputs[0] = {matrix(weight, dtype, n, k, bias),
                     {at<float>(y), n, at<const int32_t>(y_index), rows},
                     accumulate,
                     at<const float>(scale)};
  cpu::linear(args, c.get());
}

void rms_norm(OpContext& c, Address x, Address y, Address weight, int64_t rows, int64_t width,
              float eps) {
  cpu::rms_norm({{at<const float>(x), width, nullptr, rows},
                 {at<float>(y), width, nullptr, rows},
                 at<const float>(weight),
                 width,
                 eps},
                c.get());
}

void rope(OpContext& c, Address x, Address positions, Address inv_freq, int64_t rows,
          int64_t num_heads, int64_t head_dim) {
  std::vector<float> table(static_cast<size_t>(rows * head_dim));
  cpu::rope_table(
      {at<const int64_t>(positions), at<const float>(inv_freq), table.data(), rows, head_dim},
      c.get());
  cpu::rope({{at<float>(x), num_heads * head_dim, nullptr, rows},
             {table.data(), head_dim, nullptr, rows},
             num_heads,
             head_dim},
            c.get());
}

// x [rows, d] -> gates [rows]. folded, or else dec (packed float32 [d, d_r]) and head.
void router_gate(OpContext& c, Address x, int64_t rows, int64_t hidden, Address enc,
                 int64_t router_dim, Address norm, Address folded, Address dec, Address head,
                 float bias, float eps, int order, Address gates) {
  std::vector<float> encoded(static_cast<size_t>(rows * router_dim));
  std::vector<float> decoded(folded == 0 ? static_cast<size_t>(rows * hidden) : 0);
  const int f32 = static_cast<int>(DType::kFloat32);
  linear(c, x, rows, 0, enc, f32, router_dim, hidden, 0, reinterpret_cast<Address>(encoded.data()),
         0, false, 0);
  cpu::router_gate({{encoded.data(), router_dim, nullptr, rows},
                    router_dim,
                    at<const float>(norm),
                    at<const float>(folded),
                    matrix(dec, f32, hidden, router_dim, 0),
                    at<const float>(head),
                    {decoded.data(), hidden, nullptr, rows},
                    bias,
                    eps,
                    static_cast<RouterOrder>(order),
                    at<float>(gates),
                    1},
                   c.get());
}

int64_t compact(Address gates, Address forced, float threshold, bool unit_scales, int64_t rows,
                Address ran, Address run_index, Address skip_index, Address run_scale,
                Address skip_scale) {
  int32_t counts[2];
  cpu::compact({at<const float>(gates), 1, at<const uint8_t>(forced), 1, threshold, unit_scales,
                rows, at<uint8_t>(ran), 1, at<int32_t>(run_index), at<int32_t>(skip_index),
                at<float>(run_scale), at<float>(skip_scale), counts});
  return counts[0];
}

GatedMlpArgs gated(Address y, int64_t rows, int64_t hidden, Address index, Address gate, Address up,
                   Address down, int dtype, int64_t width, Address scale, Address h,
                   std::vector<float>& activation) {
  activation.resize(static_cast<size_t>(rows * width));
  const auto* rows_of = at<const int32_t>(index);
  return {{at<const float>(y), hidden, rows_of, rows},
          {at<float>(h), hidden, rows_of, rows},
          matrix(gate, dtype, width, hidden, 0),
          matrix(up, dtype, width, hidden, 0),
          matrix(down, dtype, hidden, width, 0),
          at<const float>(scale),
          activation.data()};
}

template <auto kOp>
void mlp_op(OpContext& c, Address y, int64_t rows, int64_t hidden, Address index, Address gate,
            Address up, Address down, int dtype, int64_t width, Address scale, Address h) {
  std::vector<float> activation;
  kOp(gated(y, rows, hidden, index, gate, up, down, dtype, width, scale, h, activation), c.get());
}

void lm_head(OpContext& c, Address h, int64_t rows, int64_t hidden, Address norm, float eps,
             Address weight, int dtype, int64_t vocab, Address logits) {
  std::vector<float> normed(static_cast<size_t>(rows * hidden));
  cpu::lm_head({{at<const float>(h), hidden, nullptr, rows},
                at<const float>(norm),
                eps,
                matrix(weight, dtype, vocab, hidden, 0),
                normed.data(),
                at<float>(logits)},
               c.get());
}

// New rows of one sequence: they go to the end of the cache, whose length grows by `rows`.
void kv_append(OpContext& c, KvCache& cache, int64_t layer, Address k, Address v, int64_t rows) {
  const int64_t width = cache.layout().num_kv_heads * cache.layout().head_dim;
  cache.reserve(cache.length() + rows);
  std::vector<int64_t> positions;
  for (int64_t i = cache.length(); i < cache.length() + rows; ++i) positions.push_back(i);
  const std::vector<int32_t> sequences(static_cast<size_t>(rows), 0);
  uint8_t* const* table = cache.page_table();
  cpu::kv_append({{cache.layout(), &table, cache.layer_offset(layer)},
                  {at<const float>(k), width, nullptr, rows},
                  {at<const float>(v), width, nullptr, rows},
                  positions.data(),
                  sequences.data()},
                 c.get());
  cache.set_length(cache.length() + rows);
}

void attention(OpContext& c, const std::vector<KvCache*>& caches, int64_t layer, Address q,
               int64_t rows, int64_t num_heads, Address positions, Address sequences,
               int64_t sliding_window, float scale, Address out) {
  const KvLayout& layout = caches.at(0)->layout();
  std::vector<uint8_t* const*> tables;
  for (const KvCache* cache : caches) tables.push_back(cache->page_table());
  std::vector<float> scratch(cpu::attention_scratch_floats(layout.head_dim));
  const int64_t width = num_heads * layout.head_dim;
  cpu::attention({{layout, tables.data(), caches[0]->layer_offset(layer)},
                  {at<const float>(q), width, nullptr, rows},
                  {at<float>(out), width, nullptr, rows},
                  num_heads,
                  at<const int64_t>(positions),
                  at<const int32_t>(sequences),
                  nullptr,
                  sliding_window,
                  scale,
                  scratch.data()},
                 c.get());
}

}  // namespace

void register_ops(py::module_& m) {
  py::class_<OpContext>(m, "OpContext", "Threads and kernels for ops that are called one by one.")
      .def(py::init<int, const std::string&>(), py::arg("num_threads"), py::arg("isa") = "")
      .def_property_readonly("isa", [](const OpContext& c) { return std::string(c.kernels.name); })
      .def_property_readonly("num_threads", [](const OpContext& c) { return c.pool.size(); });
  m.def("available_isas", &cpu::available_isas,
        "Instruction sets built in and runnable here, plainest first.");
  m.def("available_threads", &cpu::available_threads,
        "Processors by affinity mask and cgroup quota.");
  m.def(
      "packed_bytes",
      [](int dtype, int64_t n, int64_t k) {
        return cpu::packed_bytes(static_cast<DType>(dtype), n, k);
      },
      py::arg("dtype"), py::arg("n"), py::arg("k"));
  m.def("pack", &pack, Release(), py::arg("context"), py::arg("source"), py::arg("source_dtype"),
        py::arg("rows"), py::arg("k"), py::arg("out"), py::arg("dtype"));
  m.def("linear", &linear, Release(), py::arg("context"), py::arg("x"), py::arg("rows"),
        py::arg("x_index"), py::arg("weight"), py::arg("dtype"), py::arg("n"), py::arg("k"),
        py::arg("bias"), py::arg("y"), py::arg("y_index"), py::arg("accumulate"), py::arg("scale"));
  m.def("rms_norm", &rms_norm, Release(), py::arg("context"), py::arg("x"), py::arg("y"),
        py::arg("weight"), py::arg("rows"), py::arg("width"), py::arg("eps"));
  m.def("rope", &rope, Release(), py::arg("context"), py::arg("x"), py::arg("positions"),
        py::arg("inv_freq"), py::arg("rows"), py::arg("num_heads"), py::arg("head_dim"));
  m.def("router_gate", &router_gate, Release(), py::arg("context"), py::arg("x"), py::arg("rows"),
        py::arg("hidden"), py::arg("enc"), py::arg("router_dim"), py::arg("norm"),
        py::arg("folded"), py::arg("dec"), py::arg("head"), py::arg("bias"), py::arg("eps"),
        py::arg("order"), py::arg("gates"));
  m.def(
      "fold_router",
      [](Address dec, Address head, int64_t hidden, int64_t router_dim, Address folded) {
        cpu::fold_router(at<const float>(dec), at<const float>(head), hidden, router_dim,
                         at<float>(folded));
      },
      py::arg("dec"), py::arg("head"), py::arg("hidden"), py::arg("router_dim"), py::arg("folded"));
  m.def("compact", &compact, py::arg("gates"), py::arg("forced"), py::arg("threshold"),
        py::arg("unit_scales"), py::arg("rows"), py::arg("ran"), py::arg("run_index"),
        py::arg("skip_index"), py::arg("run_scale"), py::arg("skip_scale"));
  m.def("kv_append", &kv_append, Release(), py::arg("context"), py::arg("cache"), py::arg("layer"),
        py::arg("k"), py::arg("v"), py::arg("rows"));
  m.def("attention", &attention, Release(), py::arg("context"), py::arg("caches"), py::arg("layer"),
        py::arg("q"), py::arg("rows"), py::arg("num_heads"), py::arg("positions"),
        py::arg("sequences"), py::arg("sliding_window"), py::arg("scale"), py::arg("out"));
  m.def("feed_forward", &mlp_op<cpu::feed_forward>, Release(), py::arg("context"), py::arg("y"),
        py::arg("rows"), py::arg("hidden"), py::arg("index"), py::arg("gate"), py::arg("up"),
        py::arg("down"), py::arg("dtype"), py::arg("width"), py::arg("scale"), py::arg("h"));
  m.def("adapter", &mlp_op<cpu::adapter>, Release(), py::arg("context"), py::arg("y"),
        py::arg("rows"), py::arg("hidden"), py::arg("index"), py::arg("gate"), py::arg("up"),
        py::arg("down"), py::arg("dtype"), py::arg("width"), py::arg("scale"), py::arg("h"));
  m.def("lm_head", &lm_head, Release(), py::arg("context"), py::arg("h"), py::arg("rows"),
        py::arg("hidden"), py::arg("norm"), py::arg("eps"), py::arg("weight"), py::arg("dtype"),
        py::arg("vocab"), py::arg("logits"));
}

}  // namespace flexidepth::bindings
