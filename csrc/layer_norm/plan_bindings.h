// LayerNorm's launch plans in Python: convnext_kernels._C.plans.layer_norm.
#pragma once
#include <pybind11/pybind11.h>

#include "layer_norm/launch_plan.h"

namespace convnext_kernels {

inline void bind_layer_norm_plans(pybind11::module_ m) {
  namespace py = pybind11;
  py::class_<LayerNormPlan>(m, "LayerNormPlan")
      .def_readonly("vector_size", &LayerNormPlan::vector_size)
      .def_readonly("vectors", &LayerNormPlan::vectors)
      .def_readonly("row_threads", &LayerNormPlan::row_threads)
      .def_readonly("block_rows", &LayerNormPlan::block_rows)
      .def_readonly("blocks", &LayerNormPlan::blocks)
      .def_readonly("sum_blocks", &LayerNormPlan::sum_blocks)
      .def_readonly("shared_bytes", &LayerNormPlan::shared_bytes)
      .def_property_readonly("threads", &LayerNormPlan::threads)
      .def_property_readonly("partial_rows", &LayerNormPlan::partial_rows);
  m.attr("THREADS") = kLayerNormThreads;
  m.def("has_kernel", &layer_norm_has_kernel, py::arg("backward"), py::arg("vector_size"), py::arg("vectors"),
        "Whether there is a kernel that holds so many vectors of a row in a thread.");
  m.def("blocks_per_sm", &layer_norm_blocks_per_sm, py::arg("backward"), py::arg("vector_size"), py::arg("elements"),
        py::arg("accumulation_bytes"), "Blocks of a multiprocessor that the kernels' registers are limited for.");
  m.def("plan", &plan_layer_norm, py::arg("rows"), py::arg("channels"), py::arg("x_bytes"), py::arg("y_bytes"),
        py::arg("aligned"), py::arg("chip"), "The forward's plan, for elements of so many bytes.");
  m.def("plan_backward", &plan_layer_norm_backward, py::arg("rows"), py::arg("channels"), py::arg("grad_bytes"),
        py::arg("x_bytes"), py::arg("aligned"), py::arg("chip"), "The backward's plan.");
}

}  // namespace convnext_kernels
