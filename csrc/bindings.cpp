// The pybind11 module convnext_kernels._C: what was built, what this processor runs of it, and how kernels are spread
// over a GPU. It touches no tensor.
#include <pybind11/pybind11.h>

#include "build_facts.h"  // written by build_tools/ninja_build.py
#include "common/chip_bindings.h"
#include "common/cpu_capability.h"
#include "depthwise_conv/plan_bindings.h"
#include "depthwise_conv/tensor_plan_bindings.h"
#include "layer_norm/plan_bindings.h"
#include "mlp/plan_bindings.h"

namespace py = pybind11;
namespace convnext_kernels {
namespace {

// The names up to the closing nullptr.
template <size_t kSize>
py::tuple names(const char* const (&list)[kSize]) {
  py::tuple out(kSize - 1);
  for (size_t i = 0; i + 1 < kSize; ++i) out[i] = py::str(list[i]);
  return out;
}

py::dict build_info() {
  py::dict out;
  out["version"] = build_facts::version;
  out["commit"] = build_facts::commit;
  out["source_digest"] = build_facts::source_digest;
  out["compiler"] = build_facts::compiler;
  out["cpu_capabilities"] = names(build_facts::cpu_capabilities);
  out["cuda_version"] = *build_facts::cuda_version ? py::object(py::str(build_facts::cuda_version)) : py::none();
  out["cuda_architectures"] = names(build_facts::architectures);
  out["torch_version"] = build_facts::torch_version;
  out["plan"] = build_facts::plan;
  return out;
}

}  // namespace
}  // namespace convnext_kernels

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled part of convnext_kernels.";
  m.def("build_info", &convnext_kernels::build_info,
        "How the libraries were built, as a dict: version, commit ('unknown' where there was none), source_digest of "
        "csrc/, compiler, cpu_capabilities, cuda_version (None: built without CUDA), cuda_architectures, torch_version "
        "(the one built with), plan (the words in which the build announced itself).");
  m.def(
      "cpu_capability", [] { return convnext_kernels::name_of(convnext_kernels::cpu_capability()); },
      "The CPU kernels that run on this processor: 'portable', 'avx2', 'avx512' or 'avx512_bf16'. RuntimeError if "
      "CONVNEXT_KERNELS_CPU_CAPABILITY names another.");
  py::module_ plans = m.def_submodule("plans", "The launch plans of the CUDA kernels: functions of shape and chip.");
  convnext_kernels::bind_chip(plans);
  py::module_ depthwise_conv = plans.def_submodule("depthwise_conv");
  convnext_kernels::depthwise_conv::bind_plans(depthwise_conv);
  convnext_kernels::depthwise_conv::bind_tensor_plans(depthwise_conv);
  convnext_kernels::bind_layer_norm_plans(plans.def_submodule("layer_norm"));
  convnext_kernels::bind_mlp_plans(plans.def_submodule("mlp"));
}
