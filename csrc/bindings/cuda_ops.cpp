// Each CUDA op on raw device pointers (integers from Tensor.data_ptr()) and a stream;
// flexidepth_ext/cuda_ops.py checks and converts. Matrices are dense and row-major; 0 stands for
// "none" where a pointer is optional. `live` is a count of rows on the device.
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "bindings/address.h"
#include "bindings/register.h"
#include "cuda/context.h"
#include "ops/adapter.h"
#include "ops/attention.h"
#include "ops/compact.h"
#include "ops/embed.h"
#include "ops/feed_forward.h"
#include "ops/linear.h"
#include "ops/lm_head.h"
#include "ops/project.h"
#include "ops/residual_add.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/routed_entry.h"
#include "ops/routed_exit.h"
#include "ops/router.h"
#include "ops/router_code.h"
#include "ops/sample.h"
#include "ops/silu_and_mul.h"

namespace flexidepth::bindings {

namespace py = pybind11;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;

cuda::Context on(Address stream) { return {at<void>(stream)}; }

// A tensor of rows: where, how many, how wide, which ones, and how many of them there are.
struct RowsArg {
  Address data = 0;
  int64_t count = 0;
  int64_t width = 0;
  Address index = 0;
  Address live = 0;

  Rows read() const {
    return {at<const float>(data), width, at<const int32_t>(index), count, at<const int32_t>(live)};
  }
  MutableRows write() const {
    return {at<float>(data), width, at<const int32_t>(index), count, at<const int32_t>(live)};
  }
};

// A tensor [n, k] of weights with its bias.
struct MatrixArg {
  Address data = 0;
  int dtype = 0;
  int64_t n = 0;
  int64_t k = 0;
  Address bias = 0;

  PackedMatrix get() const {
    return {at<const uint8_t>(data), static_cast<DType>(dtype), n, k, at<const float>(bias)};
  }
};

// One layer of the pages of some sequences.
struct PagesArg {
  Address tables = 0;  // [sequence] addresses of [page] addresses
  int dtype = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t layer = 0;

  KvPages get() const {
    const KvLayout layout{static_cast<DType>(dtype), num_kv_heads, head_dim};
    return {layout, at<uint8_t* const* const>(tables),
            static_cast<size_t>(layer) * cuda::kv_layer_bytes(layout)};
  }
};

struct CompactArg {
  Address gates = 0, forced = 0, ran = 0, run_index = 0, skip_index = 0, run_scale = 0,
          skip_scale = 0, counts = 0;
  int64_t rows = 0;
  float threshold = 0;
  bool unit_scales = false;

  CompactArgs get() const {
    return {at<const float>(gates),
            1,
            at<const uint8_t>(forced),
            1,
            threshold,
            unit_scales,
            rows,
            at<uint8_t>(ran),
            1,
            at<int32_t>(run_index),
            at<int32_t>(skip_index),
            at<float>(run_scale),
            at<float>(skip_scale),
            at<int32_t>(counts)};
  }
};

struct RouterArg {
  RowsArg encoded, decoded;
  Address norm = 0, folded = 0, head = 0, gates = 0;
  MatrixArg dec;
  float bias = 0, eps = 0;
  int order = 0;

  RouterGateArgs get() const {
    return {encoded.write(),
            encoded.width,
            at<const float>(norm),
            at<const float>(folded),
            dec.get(),
            at<const float>(head),
            decoded.write(),
            bias,
            eps,
            static_cast<RouterOrder>(order),
            at<float>(gates),
            1};
  }
};

void linear(Address stream, const RowsArg& x, const MatrixArg& weight, const RowsArg& y,
            bool accumulate, Address scale) {
  LinearArgs args;
  args.x = x.read();
  args.outputs[0] = {weight.get(), y.write(), accumulate, at<const float>(scale)};
  cuda::linear(args, on(stream));
}

void rms_norm(Address stream, const RowsArg& x, const RowsArg& y, Address weight, float eps) {
  cuda::rms_norm({x.read(), y.write(), at<const float>(weight), x.width, eps}, on(stream));
}

void rope_table(Address stream, Address positions, Address inv_freq, Address cos_sin, int64_t rows,
                int64_t head_dim) {
  cuda::rope_table(
      {at<const int64_t>(positions), at<const float>(inv_freq), at<float>(cos_sin), rows, head_dim},
      on(stream));
}

void rope(Address stream, const RowsArg& x, const RowsArg& cos_sin, int64_t head_dim) {
  cuda::rope({x.write(), cos_sin.read(), x.width / head_dim, head_dim}, on(stream));
}

void router_gate(Address stream, const RouterArg& router) {
  cuda::router_gate(router.get(), on(stream));
}

void compact(Address stream, const CompactArg& args) { cuda::compact(args.get(), on(stream)); }

void embed(Address stream, Address token_ids, const MatrixArg& weight, const RowsArg& h) {
  cuda::embed({at<const int32_t>(token_ids), weight.get(), h.write()}, on(stream));
}

void kv_append(Address stream, const PagesArg& pages, const RowsArg& k, const RowsArg& v,
               Address positions, Address sequences) {
  cuda::kv_append(
      {pages.get(), k.read(), v.read(), at<const int64_t>(positions), at<const int32_t>(sequences)},
      on(stream));
}

void attention(Address stream, const PagesArg& pages, const RowsArg& q, const RowsArg& out,
               Address positions, Address sequences, Address index, int64_t sliding_window,
               float scale, Address scratch, int64_t max_pages, Address counters, bool prompt) {
  cuda::attention(
      {pages.get(), q.read(), out.write(), q.width / pages.head_dim, at<const int64_t>(positions),
       at<const int32_t>(sequences), at<const int32_t>(index), sliding_window, scale,
       at<float>(scratch), max_pages, at<int32_t>(counters), prompt},
      on(stream));
}

// y is normed by the op where `norm` is given.
template <auto kOp>
void mlp(Address stream, const RowsArg& y, const RowsArg& h, const MatrixArg& gate,
         const MatrixArg& up, const MatrixArg& down, Address scale, Address activation,
         Address norm, float eps) {
  kOp({y.read(), h.write(), gate.get(), up.get(), down.get(), at<const float>(scale),
       at<float>(activation), at<const float>(norm), eps},
      on(stream));
}

void project(Address stream, const RowsArg& h, Address norm, float eps, const MatrixArg& first,
             const RowsArg& first_out, bool rotate_first, const MatrixArg& k, const MatrixArg& v,
             const RowsArg& cos_sin, const PagesArg& pages, Address positions, Address sequences) {
  cuda::project({h.read(), at<const float>(norm), eps, first.get(), first_out.write(), rotate_first,
                 k.get(), v.get(), cos_sin.width, cos_sin.read(), pages.get(),
                 at<const int64_t>(positions), at<const int32_t>(sequences)},
                on(stream));
}

// ahead: (address, bytes) of what is brought into the L2 cache meanwhile.
void router_code(Address stream, const RowsArg& h, Address norm, float eps, const MatrixArg& enc,
                 const RowsArg& encoded,
                 const std::array<std::pair<Address, int64_t>, kMaxAhead>& ahead) {
  RouterCodeArgs args{h.read(), at<const float>(norm), eps, enc.get(), encoded.write(), {}};
  for (size_t i = 0; i < ahead.size(); ++i)
    args.ahead[i] = {at<const uint8_t>(ahead[i].first), ahead[i].second};
  cuda::router_code(args, on(stream));
}

void routed_entry(Address stream, const RowsArg& h, Address norm, float eps, const MatrixArg& q,
                  const RowsArg& q_out, const MatrixArg& k, const MatrixArg& v,
                  const RowsArg& cos_sin, const PagesArg& pages, Address positions,
                  Address sequences, const RouterArg& router, const CompactArg& decisions,
                  Address adapter_norm, const MatrixArg& gate, const MatrixArg& up,
                  Address activation) {
  RoutedEntryArgs args{{h.read(), at<const float>(norm), eps, q.get(), q_out.write(), true, k.get(),
                        v.get(), cos_sin.width, cos_sin.read(), pages.get(),
                        at<const int64_t>(positions), at<const int32_t>(sequences)},
                       router.get(),
                       decisions.get(),
                       {}};
  args.adapter.gate = gate.get();
  args.adapter.up = up.get();
  args.adapter.activation = at<float>(activation);
  args.adapter.norm = at<const float>(adapter_norm);
  args.adapter.eps = eps;
  cuda::routed_entry(args, on(stream));
}

// One MLP's second half, out of its activation.
struct HalfMlpArg {
  RowsArg activation, h;
  MatrixArg down;
  Address scale = 0;

  GatedMlpArgs get() const {
    GatedMlpArgs args{};
    args.y.count = activation.count;
    args.y.live = at<const int32_t>(activation.live);
    args.h = h.write();
    args.down = down.get();
    args.scale = at<const float>(scale);
    args.activation = at<float>(activation.data);
    return args;
  }
};

void routed_exit(Address stream, const HalfMlpArg& feed_forward, const HalfMlpArg& adapter) {
  cuda::routed_exit({feed_forward.get(), adapter.get()}, on(stream));
}

void lm_head(Address stream, const RowsArg& h, Address norm, float eps, const MatrixArg& weight,
             Address logits, Address best) {
  cuda::lm_head({h.read(), at<const float>(norm), eps, weight.get(), nullptr, at<float>(logits),
                 at<uint64_t>(best)},
                on(stream));
}

void silu_and_mul(Address stream, Address gate, Address up, Address y, int dtype, int64_t rows,
                  int64_t width, Address gate_bias, Address up_bias) {
  cuda::silu_and_mul(
      {at<const void>(gate), at<const void>(up), at<void>(y), static_cast<DType>(dtype), rows,
       width, at<const float>(gate_bias), at<const float>(up_bias)},
      on(stream));
}

void residual_add(Address stream, Address y, int dtype, const RowsArg& h, Address bias,
                  Address scale) {
  cuda::residual_add({at<const void>(y), static_cast<DType>(dtype), h.write(),
                      at<const float>(bias), at<const float>(scale)},
                     on(stream));
}

void sample(Address stream, const RowsArg& logits, float temperature, int64_t top_k, float top_p,
            float min_p, Address seeds, Address positions, Address tokens, Address logprobs,
            Address faults, Address room, bool together, bool check, Address settings) {
  cuda::sample(
      {logits.read(), logits.width, temperature, top_k, top_p, min_p, at<const uint64_t>(seeds),
       at<const int64_t>(positions), at<int32_t>(tokens), at<float>(logprobs), at<int32_t>(faults),
       at<const SampleSettings>(settings), at<void>(room), together},
      {at<void>(stream), false, check});
}

void register_arguments(py::module_& m) {
  py::class_<RowsArg>(m, "Rows", "Rows of a float32 matrix on the device.")
      .def(py::init<Address, int64_t, int64_t, Address, Address>(), py::arg("data") = 0,
           py::arg("count") = 0, py::arg("width") = 0, py::arg("index") = 0, py::arg("live") = 0);
  py::class_<MatrixArg>(m, "Matrix", "Weights [n, k] on the device.")
      .def(py::init<Address, int, int64_t, int64_t, Address>(), py::arg("data") = 0,
           py::arg("dtype") = 0, py::arg("n") = 0, py::arg("k") = 0, py::arg("bias") = 0);
  py::class_<PagesArg>(m, "Pages", "One layer of the caches of some sequences.")
      .def(py::init<Address, int, int64_t, int64_t, int64_t>(), py::arg("tables") = 0,
           py::arg("dtype") = 0, py::arg("num_kv_heads") = 0, py::arg("head_dim") = 0,
           py::arg("layer") = 0);
  py::class_<CompactArg>(m, "Compact", "Gates, and where decisions go.")
      .def(py::init<Address, Address, Address, Address, Address, Address, Address, Address, int64_t,
                    float, bool>(),
           py::arg("gates"), py::arg("forced"), py::arg("ran"), py::arg("run_index"),
           py::arg("skip_index"), py::arg("run_scale"), py::arg("skip_scale"), py::arg("counts"),
           py::arg("rows"), py::arg("threshold"), py::arg("unit_scales"));
  py::class_<RouterArg>(m, "Router", "A layer's router behind its first matrix.")
      .def(py::init<RowsArg, RowsArg, Address, Address, Address, Address, MatrixArg, float, float,
                    int>(),
           py::arg("encoded"), py::arg("decoded"), py::arg("norm"), py::arg("folded"),
           py::arg("head"), py::arg("gates"), py::arg("dec"), py::arg("bias"), py::arg("eps"),
           py::arg("order"));
  py::class_<HalfMlpArg>(m, "HalfMlp", "An MLP's activation and what is behind it.")
      .def(py::init<RowsArg, RowsArg, MatrixArg, Address>(), py::arg("activation"), py::arg("h"),
           py::arg("down"), py::arg("scale"));
}

}  // namespace

void register_cuda_ops(py::module_& m) {
  register_arguments(m);
  m.def("linear", &linear, Release(), py::arg("stream"), py::arg("x"), py::arg("weight"),
        py::arg("y"), py::arg("accumulate"), py::arg("scale"));
  m.def("rms_norm", &rms_norm, Release(), py::arg("stream"), py::arg("x"), py::arg("y"),
        py::arg("weight"), py::arg("eps"));
  m.def("rope_table", &rope_table, Release(), py::arg("stream"), py::arg("positions"),
        py::arg("inv_freq"), py::arg("cos_sin"), py::arg("rows"), py::arg("head_dim"));
  m.def("rope", &rope, Release(), py::arg("stream"), py::arg("x"), py::arg("cos_sin"),
        py::arg("head_dim"));
  m.def("router_gate", &router_gate, Release(), py::arg("stream"), py::arg("router"));
  m.def("compact", &compact, Release(), py::arg("stream"), py::arg("args"));
  m.def("embed", &embed, Release(), py::arg("stream"), py::arg("token_ids"), py::arg("weight"),
        py::arg("h"));
  m.def("kv_append", &kv_append, Release(), py::arg("stream"), py::arg("pages"), py::arg("k"),
        py::arg("v"), py::arg("positions"), py::arg("sequences"));
  m.def(
      "kv_layer_bytes",
      [](int dtype, int64_t num_kv_heads, int64_t head_dim) {
        return cuda::kv_layer_bytes({static_cast<DType>(dtype), num_kv_heads, head_dim});
      },
      py::arg("dtype"), py::arg("num_kv_heads"), py::arg("head_dim"));
  m.def("attention_scratch_floats", &cuda::attention_scratch_floats, py::arg("rows"),
        py::arg("num_heads"), py::arg("head_dim"), py::arg("max_pages"));
  m.def("attention_counters", &cuda::attention_counters, py::arg("rows"), py::arg("num_heads"));
  m.def("attention", &attention, Release(), py::arg("stream"), py::arg("pages"), py::arg("q"),
        py::arg("out"), py::arg("positions"), py::arg("sequences"), py::arg("index"),
        py::arg("sliding_window"), py::arg("scale"), py::arg("scratch"), py::arg("max_pages"),
        py::arg("counters"), py::arg("prompt"));
  m.def("feed_forward", &mlp<cuda::feed_forward>, Release(), py::arg("stream"), py::arg("y"),
        py::arg("h"), py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("scale"),
        py::arg("activation"), py::arg("norm"), py::arg("eps"));
  m.def("adapter", &mlp<cuda::adapter>, Release(), py::arg("stream"), py::arg("y"), py::arg("h"),
        py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("scale"), py::arg("activation"),
        py::arg("norm"), py::arg("eps"));
  m.def("project", &project, Release(), py::arg("stream"), py::arg("h"), py::arg("norm"),
        py::arg("eps"), py::arg("first"), py::arg("first_out"), py::arg("rotate_first"),
        py::arg("k"), py::arg("v"), py::arg("cos_sin"), py::arg("pages"), py::arg("positions"),
        py::arg("sequences"));
  m.def("router_code", &router_code, Release(), py::arg("stream"), py::arg("h"), py::arg("norm"),
        py::arg("eps"), py::arg("enc"), py::arg("encoded"), py::arg("ahead"));
  m.def("routed_entry", &routed_entry, Release(), py::arg("stream"), py::arg("h"), py::arg("norm"),
        py::arg("eps"), py::arg("q"), py::arg("q_out"), py::arg("k"), py::arg("v"),
        py::arg("cos_sin"), py::arg("pages"), py::arg("positions"), py::arg("sequences"),
        py::arg("router"), py::arg("decisions"), py::arg("adapter_norm"), py::arg("gate"),
        py::arg("up"), py::arg("activation"));
  m.def("routed_exit", &routed_exit, Release(), py::arg("stream"), py::arg("feed_forward"),
        py::arg("adapter"));
  m.def("lm_head", &lm_head, Release(), py::arg("stream"), py::arg("h"), py::arg("norm"),
        py::arg("eps"), py::arg("weight"), py::arg("logits"), py::arg("best"));
  m.def("silu_and_mul", &silu_and_mul, Release(), py::arg("stream"), py::arg("gate"), py::arg("up"),
        py::arg("y"), py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("gate_bias"),
        py::arg("up_bias"));
  m.def("residual_add", &residual_add, Release(), py::arg("stream"), py::arg("y"), py::arg("dtype"),
        py::arg("h"), py::arg("bias"), py::arg("scale"));
  m.def("sample", &sample, Release(), py::arg("stream"), py::arg("logits"), py::arg("temperature"),
        py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seeds"),
        py::arg("positions"), py::arg("tokens"), py::arg("logprobs"), py::arg("faults"),
        py::arg("room"), py::arg("together"), py::arg("check") = false, py::arg("settings") = 0);
  m.def("sample_room_bytes", &cuda::sample_room_bytes, py::arg("rows"));
}

}  // namespace flexidepth::bindings
