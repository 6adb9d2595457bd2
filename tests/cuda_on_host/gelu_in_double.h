// GELU in double, and how far the kernels' may be from it.
#pragma once
#include "harness.h"
#include "mlp/gelu.cuh"

namespace convnext_kernels {

inline Gelu gelu_kind(const harness::Options& options) {
  return options.text("gelu") == "tanh" ? Gelu::kTanh : Gelu::kErf;
}

inline double gelu_in_double(double x, Gelu kind) {
  if (kind == Gelu::kErf) return 0.5 * x * std::erfc(-x * M_SQRT1_2);
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * u));
}

inline double gelu_derivative_in_double(double x, Gelu kind) {
  if (kind == Gelu::kErf) return 0.5 * std::erfc(-x * M_SQRT1_2) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  const double slope = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
  const double gate = 1 / (1 + std::exp(-2 * u)), closed = 1 / (1 + std::exp(2 * u));
  return gate + 2 * x * gate * closed * slope;
}

// How far a result of type T may be from the exact one before it is rounded to T, where x + bias was computed from
// terms whose sizes sum to `size`. The fp32 kernel, as PyTorch's, adds erf to 1 and so loses the last digits of small
// results; the 16-bit kernels do not.
template <class T>
double forward_error(double size, double y) {
  if (std::is_same_v<T, double>) return 5e-16 * size;
  if (std::is_same_v<T, float>) return 2e-7 * size;
  return std::ldexp(std::fabs(y), -13) + 6e-8 * size;
}
template <class T>
double derivative_error(double size) {
  if (std::is_same_v<T, double>) return 1e-15 * (1 + size);
  if (std::is_same_v<T, float>) return 3e-7 * (1 + size);
  return 2e-5;
}

}  // namespace convnext_kernels
