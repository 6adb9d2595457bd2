// What layer_norm and its backward check of CUDA tensors, and the types they run on.
#pragma once
#include "common/cuda_context.h"
#include "layer_norm/layer_norm.cuh"

namespace convnext_kernels::layer_norm_checks {

// A (..., C) tensor as rows of C.
struct Rows {
  int64_t rows, channels;
};

inline Rows check_activation(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  check_cuda(op, argument, tensor, like);
  check_dtype(op, argument, tensor);
  check_contiguous(op, argument, tensor);
  if (tensor.dim() < 1 || tensor.size(tensor.dim() - 1) < 1)
    fail(op, argument, "shape (..., C) with C >= 1", describe(tensor.sizes()));
  const int64_t channels = tensor.size(tensor.dim() - 1);
  return {tensor.numel() / channels, channels};
}

// The parameter as it will be read: contiguous.
inline OptionalTensor check_parameter(const char* op, const char* argument, const OptionalTensor& parameter,
                                      const Tensor& x, int64_t channels) {
  if (!parameter) return std::nullopt;
  check_cuda(op, argument, *parameter, x);
  check_dtype(op, argument, *parameter);
  check_shape(op, argument, *parameter, {channels});
  return torch::stable::contiguous(*parameter);
}

inline void check_statistic(const char* op, const char* argument, const Tensor& tensor,
                            const std::vector<int64_t>& shape, const Tensor& x) {
  check_cuda(op, argument, tensor, x);
  check_shape(op, argument, tensor, shape);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  if (tensor.scalar_type() != accumulation) fail(op, argument, describe(accumulation), describe(tensor.scalar_type()));
  check_contiguous(op, argument, tensor);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

inline std::vector<int64_t> shape_without_last(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end() - 1};
}

// The type that stands in for `other`, the type of y or its gradient, where no kernel has it beside that of x: the
// accumulation type.
inline ScalarType kernel_type(ScalarType x, ScalarType other) {
  const bool exists = other == x || (x == ScalarType::Float && other != ScalarType::Double);
  return exists ? other : accumulation_type(x);
}

// Calls function(element of x, element of the other tensor), of types that kernel_type lets through.
template <class Function>
void dispatch_elements(ScalarType x, ScalarType other, Function&& function) {
  dispatch_element(x, [&](auto x_element) {
    using T = decltype(x_element);
    dispatch_element(other, [&](auto other_element) {
      if constexpr (kHasLayerNorm<T, decltype(other_element)>) {
        function(T{}, other_element);
      } else {
        throw std::logic_error("convnext_kernels: layer_norm has no kernel for these types");
      }
    });
  });
}

}  // namespace convnext_kernels::layer_norm_checks
