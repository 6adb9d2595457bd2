// The MLP's launch plans in Python: convnext_kernels._C.plans.mlp.
#pragma once
#include <pybind11/pybind11.h>

#include "mlp/chunk_plan.h"
#include "mlp/launch_plan.h"

namespace convnext_kernels {

inline void bind_mlp_plans(pybind11::module_ m) {
  namespace py = pybind11;
  py::class_<RowPassPlan>(m, "RowPassPlan")
      .def_readonly("vector_size", &RowPassPlan::vector_size)
      .def_readonly("block_columns", &RowPassPlan::block_columns)
      .def_readonly("block_rows", &RowPassPlan::block_rows)
      .def_readonly("column_blocks", &RowPassPlan::column_blocks)
      .def_readonly("row_blocks", &RowPassPlan::row_blocks);
  py::class_<RowPassTuning>(m, "RowPassTuning")
      .def_readonly("thread_rows", &RowPassTuning::thread_rows)
      .def_readonly("blocks_per_sm", &RowPassTuning::blocks_per_sm)
      .def_readonly("waves", &RowPassTuning::waves);
  py::enum_<RowPass>(m, "RowPass")
      .value("ACTIVATION", RowPass::kActivation)
      .value("ACTIVATION_BACKWARD", RowPass::kActivationBackward)
      .value("GRN_SUMS", RowPass::kGrnSums)
      .value("GRN_BACKWARD_SUMS", RowPass::kGrnBackwardSums)
      .value("ADD_BRANCH", RowPass::kAddBranch)
      .value("BRANCH_GRAD", RowPass::kBranchGrad);
  m.attr("ROW_PASS_THREADS") = kRowPassThreads;
  m.attr("MAX_WORKSPACE_BYTES") = kMaxWorkspaceBytes;
  m.def("bias_gelu_tuning", &bias_gelu_tuning, py::arg("backward"), py::arg("element_bytes"),
        "What the kernel of bias_gelu, or of its backward, was tuned to.");
  m.def("row_pass_tuning", &row_pass_tuning, py::arg("row_pass"), py::arg("heavy"), py::arg("element_bytes"),
        "What a pass of layer_norm_mlp was tuned to; heavy: with GRN, or with a residual wider than the branch.");
  m.def("row_pass_vector_size", &row_pass_vector_size, py::arg("columns"), py::arg("element_bytes"), py::arg("aligned"),
        "Elements a thread reads at once; aligned: every tensor starts at a multiple of 16 bytes.");
  m.def("plan_row_pass", &plan_row_pass, py::arg("tuning"), py::arg("groups"), py::arg("rows"), py::arg("columns"),
        py::arg("vector_size"), py::arg("multiprocessors"),
        "How `groups` stretches of (rows, columns) elements are spread over the GPU.");
  m.def(
      "plan_bias_gelu", &plan_bias_gelu, py::arg("backward"), py::arg("rows"), py::arg("columns"),
      py::arg("element_bytes"), py::arg("aligned"), py::arg("multiprocessors"),
      "How (rows, columns) elements are spread over the GPU; aligned: every tensor starts at a multiple of 16 bytes.");
  m.def(
      "chunk_rows",
      [](int64_t rows, int64_t unit, int64_t row_bytes, int64_t image_bytes, int64_t call_bytes, int64_t most_bytes,
         int64_t most_rows) {
        return mlp_cuda_chunk_rows(rows, unit, {row_bytes, image_bytes, call_bytes}, most_bytes, most_rows);
      },
      py::arg("rows"), py::arg("unit"), py::arg("row_bytes"), py::arg("image_bytes"), py::arg("call_bytes"),
      py::arg("most_bytes"), py::arg("most_rows"),
      "Rows that layer_norm_mlp takes through its matrix products at a time; `unit` rows stay together.");
}

}  // namespace convnext_kernels
