// The pass of the CUDA engine. Pointers come as integers from Tensor.data_ptr();
// flexidepth_ext/cuda_engine.py checks the tensors and keeps them alive while they are in use.
#include "bindings/address.h"
#include "bindings/model_shape.h"
#include "bindings/register.h"
#include "engine/cuda_pass.h"
#include "ops/advance.h"

namespace flexidepth::bindings {

namespace py = pybind11;

namespace {

void run(const CudaPass& pass, Address stream, int64_t rows, bool prompt, Address token_ids,
         Address positions, Address sequences, Address tables, int64_t max_pages, int routing,
         Address mask, Address thresholds, Address logits_rows, int64_t num_logits, Address logits,
         Address gates, Address ran, Address scratch, int64_t scratch_rows, int64_t scratch_pages,
         int64_t prefetch_bytes, bool overlap, bool check, bool persistent) {
  CudaBatch batch;
  batch.rows = rows;
  batch.prompt = prompt;
  batch.token_ids = at<const int32_t>(token_ids);
  batch.positions = at<const int64_t>(positions);
  batch.sequences = at<const int32_t>(sequences);
  batch.tables = at<uint8_t* const* const>(tables);
  batch.max_pages = max_pages;
  batch.routing = static_cast<Routing>(routing);
  batch.mask = at<const uint8_t>(mask);
  batch.thresholds = at<const float>(thresholds);
  batch.logits_rows = at<const int32_t>(logits_rows);
  batch.num_logits = num_logits;
  batch.logits = at<float>(logits);
  batch.gates = at<float>(gates);
  batch.ran = at<uint8_t>(ran);
  batch.scratch = at<void>(scratch);
  batch.scratch_rows = scratch_rows;
  batch.scratch_pages = scratch_pages;
  batch.prefetch_bytes = prefetch_bytes;
  batch.persistent = persistent;
  pass.run(batch, {at<void>(stream), overlap, check});
}

void advance(Address stream, int64_t rows, int64_t num_routed, Address tokens, Address logprobs,
             Address faults, Address gates, Address ran, Address positions, Address draws,
             Address step, int64_t size, Address ring_tokens, Address ring_logprobs,
             Address ring_faults, Address ring_gates, Address ring_ran, bool check) {
  cuda::advance({rows, num_routed, at<const int32_t>(tokens), at<const float>(logprobs),
                 at<const int32_t>(faults), at<const float>(gates), at<const uint8_t>(ran),
                 at<int64_t>(positions), at<int64_t>(draws), at<int64_t>(step), size,
                 at<int32_t>(ring_tokens), at<float>(ring_logprobs), at<int32_t>(ring_faults),
                 at<float>(ring_gates), at<uint8_t>(ring_ran)},
                {at<void>(stream), false, check});
}

}  // namespace

void register_cuda_engine(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("advance", &advance, Release(), py::arg("stream"), py::arg("rows"), py::arg("num_routed"),
        py::arg("tokens"), py::arg("logprobs"), py::arg("faults"), py::arg("gates"), py::arg("ran"),
        py::arg("positions"), py::arg("draws"), py::arg("step"), py::arg("size"),
        py::arg("ring_tokens"), py::arg("ring_logprobs"), py::arg("ring_faults"),
        py::arg("ring_gates"), py::arg("ring_ran"), py::arg("check"));
  py::class_<CudaPass>(m, "CudaPass", "The kernels of a forward pass, on weights of the caller.",
                       py::module_local())
      .def(py::init([](const py::dict& shape, Address inv_freq) {
             return std::make_unique<CudaPass>(shape_from(shape), at<const float>(inv_freq));
           }),
           py::arg("shape"), py::arg("inv_freq"))
      .def(
          "set_weight",
          [](CudaPass& p, const std::string& name, Address address, int dtype, int64_t rows,
             int64_t columns) {
            p.weights().set(name, at<const void>(address), static_cast<DType>(dtype), rows,
                            columns);
          },
          py::arg("name"), py::arg("address"), py::arg("dtype"), py::arg("rows"),
          py::arg("columns"))
      .def(
          "set_router",
          [](CudaPass& p, int64_t routed, Address folded, float bias) {
            p.weights().set_router(routed, at<const float>(folded), bias);
          },
          py::arg("routed"), py::arg("folded"), py::arg("bias"))
      .def("finish_loading", [](CudaPass& p) { p.weights().finish(); })
      .def_property_readonly("layer_table_bytes", &CudaPass::layer_table_bytes)
      .def(
          "write_layer_table",
          [](const CudaPass& p, Address to) { p.write_layer_table(at<void>(to)); }, py::arg("to"))
      .def(
          "set_layer_table",
          [](CudaPass& p, Address on_device) { p.set_layer_table(at<const void>(on_device)); },
          py::arg("on_device"))
      .def("scratch_bytes", &CudaPass::scratch_bytes, py::arg("rows"), py::arg("max_pages"),
           py::arg("prompt"))
      .def_property_readonly("page_bytes", &CudaPass::page_bytes)
      .def("run", &run, Release(), py::arg("stream"), py::arg("rows"), py::arg("prompt"),
           py::arg("token_ids"), py::arg("positions"), py::arg("sequences"), py::arg("tables"),
           py::arg("max_pages"), py::arg("routing"), py::arg("mask"), py::arg("thresholds"),
           py::arg("logits_rows"), py::arg("num_logits"), py::arg("logits"), py::arg("gates"),
           py::arg("ran"), py::arg("scratch"), py::arg("scratch_rows"), py::arg("scratch_pages"),
           py::arg("prefetch_bytes"), py::arg("overlap"), py::arg("check"),
           py::arg("persistent") = false);
}

}  // namespace flexidepth::bindings
