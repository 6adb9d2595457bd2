// Chip and its limits in Python: convnext_kernels._C.plans.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/chip.h"

namespace convnext_kernels {

inline void bind_chip(pybind11::module_ m) {
  namespace py = pybind11;
  py::class_<Chip>(m, "Chip",
                   "What of a GPU the plans depend on; shared_bytes_per_block is what a block gets with opt-in.")
      .def(py::init<int, int64_t, int64_t, int>(), py::arg("multiprocessors"), py::arg("shared_bytes_per_block"),
           py::arg("shared_bytes_per_multiprocessor"), py::arg("threads_per_multiprocessor") = 2048)
      .def_readonly("multiprocessors", &Chip::multiprocessors)
      .def_readonly("shared_bytes_per_block", &Chip::shared_bytes_per_block)
      .def_readonly("shared_bytes_per_multiprocessor", &Chip::shared_bytes_per_multiprocessor)
      .def_readonly("threads_per_multiprocessor", &Chip::threads_per_multiprocessor);
  m.attr("REGISTERS_PER_MULTIPROCESSOR") = kRegistersPerMultiprocessor;
  m.def(
      "chip_of_architecture",
      [](int compute_capability) {
        const Chip chip = chip_of_architecture(compute_capability);
        if (!chip.multiprocessors)
          throw std::invalid_argument(
              "chip_of_architecture: argument 'compute_capability': expected 80, 86, 89, 90, "
              "100 or 120, got " +
              std::to_string(compute_capability));
        return chip;
      },
      py::arg("compute_capability"),
      "The Chip of sm_80, 86, 89, 90, 100 or 120: its limits, and the multiprocessors of its large part. ValueError "
      "for "
      "another.");
}

}  // namespace convnext_kernels
