// The plans of the depthwise convolution on the tensor cores in Python: convnext_kernels._C.plans.depthwise_conv.
#pragma once
#include <pybind11/pybind11.h>

#include "depthwise_conv/tensor_launch_plan.h"

namespace convnext_kernels::depthwise_conv {

inline void bind_tensor_plans(pybind11::module_ m) {
  namespace py = pybind11;
  py::class_<TensorPlan>(m, "TensorPlan")
      .def_readonly("blocks", &TensorPlan::blocks)
      .def_readonly("images", &TensorPlan::images)
      .def_readonly("segments", &TensorPlan::segments)
      .def_readonly("rows", &TensorPlan::rows)
      .def_readonly("columns", &TensorPlan::columns)
      .def_readonly("row_patches", &TensorPlan::row_patches)
      .def_readonly("column_patches", &TensorPlan::column_patches)
      .def_readonly("patches", &TensorPlan::patches)
      .def_readonly("chunks", &TensorPlan::chunks)
      .def_readonly("row_blocks", &TensorPlan::row_blocks)
      .def_readonly("shared_bytes", &TensorPlan::shared_bytes)
      .def_readonly("resident_blocks", &TensorPlan::resident_blocks)
      .def_property_readonly("exists", &TensorPlan::exists)
      .def_property_readonly("segment_rows", &TensorPlan::segment_rows)
      .def("first_patch", &TensorPlan::first_patch, py::arg("block"));
  m.attr("CHANNELS_OF_A_TENSOR_CHUNK") = kTensorChunk;
  m.attr("TENSOR_CONVOLUTION_WARPS") = kTensorConvolutionWarps;
  m.attr("TENSOR_GRADIENT_WARPS") = kTensorGradientWarps;
  m.def("plan_tensor", &plan_tensor, py::arg("kind"), py::arg("samples"), py::arg("channels"), py::arg("height"),
        py::arg("width"), py::arg("staged_bytes"), py::arg("chip"), py::arg("input_bytes") = 2,
        "Version 2's plan (7 x 7, stride 1, 16 bits); staged_bytes: of a result in shared memory, 4 before a residual; "
        "input_bytes: 4 for an input in fp32 that is rounded on the way.");
  m.def("prefers_tensor", &prefers_tensor, py::arg("kind"), py::arg("plan"), py::arg("height"), py::arg("width"),
        py::arg("chip"), "Whether version 2 is expected to be the faster one.");
}

}  // namespace convnext_kernels::depthwise_conv
