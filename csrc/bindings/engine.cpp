// The engine and its cache. Pointers come as integers from Tensor.data_ptr();
// flexidepth_ext/engine.py checks the tensors and keeps them alive for the length of a call.
#include "engine/engine.h"

#include <pybind11/stl.h>

#include <map>

#include "bindings/address.h"
#include "bindings/model_shape.h"
#include "bindings/register.h"
#include "core/check.h"
#include "ops/sample.h"

namespace flexidepth::bindings {

namespace py = pybind11;

namespace {

// A cache outside an engine, for the ops called one by one.
std::unique_ptr<KvCache> bare_cache(int dtype, int64_t layers, int64_t kv_heads, int64_t head_dim,
                                    int64_t length) {
  ModelShape shape;
  shape.dtype = static_cast<DType>(dtype);
  shape.num_layers = layers;
  shape.num_kv_heads = kv_heads;
  shape.head_dim = head_dim;
  return std::make_unique<KvCache>(shape, length);
}

void forward(Engine& engine, Address token_ids, const std::vector<int64_t>& counts,
             const std::vector<KvCache*>& caches, int64_t rows, int routing, Address mask,
             Address thresholds, Address logits_rows, int64_t num_logits, Address logits,
             Address gates, Address ran) {
  check(counts.size() == caches.size(), ErrorKind::kShape, "engine: ", counts.size(),
        " counts for ", caches.size(), " caches");
  Batch batch;
  batch.token_ids = at<const int32_t>(token_ids);
  batch.rows = rows;
  batch.counts = counts;
  batch.caches = caches;
  batch.routing = static_cast<Routing>(routing);
  batch.mask = at<const uint8_t>(mask);
  batch.thresholds = at<const float>(thresholds);
  batch.logits_rows = at<const int32_t>(logits_rows);
  batch.num_logits = num_logits;
  batch.logits = at<float>(logits);
  batch.gates = at<float>(gates);
  batch.ran = at<uint8_t>(ran);
  engine.forward(batch);
}

void sample(Engine& engine, Address logits, int64_t rows, int64_t vocab, float temperature,
            int64_t top_k, float top_p, float min_p, Address seeds, Address positions,
            Address tokens, Address logprobs) {
  cpu::sample({{at<const float>(logits), vocab, nullptr, rows},
               vocab,
               temperature,
               top_k,
               top_p,
               min_p,
               at<const uint64_t>(seeds),
               at<const int64_t>(positions),
               at<int32_t>(tokens),
               at<float>(logprobs)},
              engine.context());
}

// {"routed.adapter": seconds, ...}; parts outside routed layers have no prefix.
std::map<std::string, double> times(const Engine& engine) {
  std::map<std::string, double> found;
  for (size_t part = 0; part < kParts; ++part)
    for (const bool routed : {false, true})
      found[(routed ? "routed." : "") + std::string(kPartNames[part])] =
          engine.times().seconds(part, routed);
  return found;
}

}  // namespace

void register_engine(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<KvCache>(m, "KVCache", "Keys and values of one sequence.")
      .def(py::init(&bare_cache), py::arg("dtype"), py::arg("num_layers"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("max_length"))
      .def_property_readonly("length", &KvCache::length)
      .def_property_readonly("max_length", &KvCache::max_length)
      .def_property_readonly("nbytes", &KvCache::nbytes)
      .def("truncate", &KvCache::truncate, py::arg("length"))
      .def("copy_from", &KvCache::copy_from, py::arg("other"), Release())
      .def("release", &KvCache::release)
      .def("poison_unused", &KvCache::poison_unused);
  py::class_<Engine>(m, "Engine", "Weights, threads and scratch of one model.")
      .def(py::init([](const py::dict& shape, int num_threads, int64_t max_rows,
                       const std::string& isa) {
             return std::make_unique<Engine>(shape_from(shape), num_threads, max_rows, isa);
           }),
           py::arg("shape"), py::arg("num_threads"), py::arg("max_rows"), py::arg("isa") = "")
      .def_property_readonly("num_threads", &Engine::num_threads)
      .def_property_readonly("isa", [](const Engine& e) { return std::string(e.isa()); })
      .def_property_readonly("weight_bytes", &Engine::weight_bytes)
      .def_property_readonly("closed", &Engine::closed)
      .def(
          "set_weight",
          [](Engine& e, const std::string& name, Address source, int dtype, int64_t rows,
             int64_t columns) {
            e.set_weight(name, at<const void>(source), static_cast<DType>(dtype), rows, columns);
          },
          Release(), py::arg("name"), py::arg("source"), py::arg("dtype"), py::arg("rows"),
          py::arg("columns"))
      .def("finish_loading", &Engine::finish_loading, Release())
      .def("new_cache", &Engine::new_cache, py::arg("max_length"))
      .def("forward", &forward, Release(), py::arg("token_ids"), py::arg("counts"),
           py::arg("caches"), py::arg("rows"), py::arg("routing"), py::arg("mask"),
           py::arg("thresholds"), py::arg("logits_rows"), py::arg("num_logits"), py::arg("logits"),
           py::arg("gates"), py::arg("ran"))
      .def("sample", &sample, Release(), py::arg("logits"), py::arg("rows"), py::arg("vocab"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("seeds"), py::arg("positions"), py::arg("tokens"), py::arg("logprobs"))
      .def("record_times", &Engine::record_times, py::arg("on"))
      .def("times", &times, "Seconds of recorded passes by part; routed layers have a prefix.")
      .def("poison_scratch", &Engine::poison_scratch)
      .def("close", &Engine::close);
}

}  // namespace flexidepth::bindings
