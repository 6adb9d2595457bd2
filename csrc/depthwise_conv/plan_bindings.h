// The depthwise convolution's launch plans in Python: convnext_kernels._C.plans.depthwise_conv.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "depthwise_conv/launch_plan.h"

namespace convnext_kernels::depthwise_conv {

// The stages that a block goes through, as its kernel walks them.
template <Kind kKind>
std::vector<Stage> stages_of_block(const TilePlan& plan, int64_t block) {
  std::vector<Stage> stages;
  for (Stage stage = first_stage<kKind>(plan, block); stage.steps > 0; stage = next_stage<kKind>(plan, stage))
    stages.push_back(stage);
  return stages;
}

inline void bind_plans(pybind11::module_ m) {
  namespace py = pybind11;
  py::enum_<Kind>(m, "Kind").value("CONVOLUTION", Kind::kConvolution).value("WEIGHT_GRADIENT", Kind::kWeightGradient);
  py::class_<Stage>(m, "Stage")
      .def_readonly("sample", &Stage::sample)
      .def_readonly("tile", &Stage::tile)
      .def_readonly("first", &Stage::first)
      .def_readonly("end", &Stage::end)
      .def_readonly("step", &Stage::step)
      .def_readonly("steps", &Stage::steps)
      .def_readonly("last", &Stage::last);
  py::class_<TilePlan>(m, "TilePlan")
      .def_readonly("strips", &TilePlan::strips)
      .def_readonly("images", &TilePlan::images)
      .def_readonly("tiles", &TilePlan::tiles)
      .def_readonly("row_blocks", &TilePlan::row_blocks)
      .def_readonly("chunks", &TilePlan::chunks)
      .def_readonly("rows", &TilePlan::rows)
      .def_readonly("height", &TilePlan::height)
      .def_readonly("shared_bytes", &TilePlan::shared_bytes)
      .def_readonly("columns", &TilePlan::columns)
      .def_readonly("haloed_pixels", &TilePlan::haloed_pixels)
      .def_property_readonly("warps", &TilePlan::warps)
      .def("first_row", &TilePlan::first_row, py::arg("block"))
      .def("stage_elements", &TilePlan::stage_elements, py::arg("kind"))
      .def(
          "stages",
          [](const TilePlan& plan, Kind kind, int64_t block) {
            if (block < 0 || block >= plan.row_blocks)
              throw std::out_of_range("TilePlan.stages: argument 'block': expected 0 to " +
                                      std::to_string(plan.row_blocks - 1) + ", got " + std::to_string(block));
            return kind == Kind::kConvolution ? stages_of_block<Kind::kConvolution>(plan, block)
                                              : stages_of_block<Kind::kWeightGradient>(plan, block);
          },
          py::arg("kind"), py::arg("block"), "The stages that a block goes through, in order.");
  py::class_<SimplePlan>(m, "SimplePlan")
      .def_readonly("chunks", &SimplePlan::chunks)
      .def_readonly("rows", &SimplePlan::rows)
      .def_readonly("row_blocks", &SimplePlan::row_blocks)
      .def("first_row", &SimplePlan::first_row, py::arg("block"));
  m.attr("CHANNELS_OF_A_CHUNK") = kChunk;
  m.attr("MOST_WARPS") = kMaxWarps;
  m.attr("RESIDENT_WARPS") = kResidentWarps;
  m.def("plan_tiles", &plan_tiles, py::arg("kind"), py::arg("samples"), py::arg("channels"), py::arg("height"),
        py::arg("width"), py::arg("element_bytes"), py::arg("chip"),
        "The tuned kernels' plan (7 x 7, stride 1); element_bytes of the input.");
  m.def("plan_simple", &plan_simple, py::arg("samples"), py::arg("channels"), py::arg("height"), py::arg("chip"),
        "The simple kernels' plan; height of the result, or of the output's gradient.");
  m.def("is_tuned", &is_tuned, py::arg("kernel_size"), py::arg("stride"), py::arg("channels"), py::arg("element_bytes"),
        py::arg("aligned"),
        "Whether the tuned kernels take this; element_bytes of the narrowest tensor, aligned: every tensor starts at a "
        "multiple of 16 bytes.");
}

}  // namespace convnext_kernels::depthwise_conv
