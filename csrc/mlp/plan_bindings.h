// The MLP's launch plans in Python: convnext_kernels._C.plans.mlp.
#pragma once
#include <pybind11/pybind11.h>

#include "mlp/launch_plan.h"

namespace convnext_kernels {

inline void bind_mlp_plans(pybind11::module_ m) {
  namespace py = pybind11;
  py::class_<BiasGeluPlan>(m, "BiasGeluPlan")
      .def_readonly("vector_size", &BiasGeluPlan::vector_size)
      .def_readonly("block_columns", &BiasGeluPlan::block_columns)
      .def_readonly("block_rows", &BiasGeluPlan::block_rows)
      .def_readonly("column_blocks", &BiasGeluPlan::column_blocks)
      .def_readonly("row_blocks", &BiasGeluPlan::row_blocks);
  py::class_<BiasGeluTuning>(m, "BiasGeluTuning")
      .def_readonly("thread_rows", &BiasGeluTuning::thread_rows)
      .def_readonly("blocks_per_sm", &BiasGeluTuning::blocks_per_sm)
      .def_readonly("waves", &BiasGeluTuning::waves);
  m.attr("BIAS_GELU_THREADS") = kBiasGeluThreads;
  m.def("bias_gelu_tuning", &bias_gelu_tuning, py::arg("backward"), py::arg("element_bytes"),
        "What the kernel of bias_gelu, or of its backward, was tuned to.");
  m.def(
      "plan_bias_gelu", &plan_bias_gelu, py::arg("backward"), py::arg("rows"), py::arg("columns"),
      py::arg("element_bytes"), py::arg("aligned"), py::arg("multiprocessors"),
      "How (rows, columns) elements are spread over the GPU; aligned: every tensor starts at a multiple of 16 bytes.");
}

}  // namespace convnext_kernels
