// What the entries of the row-wise operators share on every device: shapes, parameters, checks.
#pragma once
#include <string>
#include <vector>

#include "common/tensor.h"

namespace convnext_kernels {

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline std::vector<int64_t> shape_with_last(const Tensor& tensor, int64_t last) {
  auto shape = shape_of(tensor);
  shape.back() = last;
  return shape;
}

inline std::vector<int64_t> shape_without_last(const Tensor& tensor) {
  auto shape = shape_of(tensor);
  shape.pop_back();
  return shape;
}

// The same memory outside of autograd: nothing the operator calls may depend on the caller's grad mode.
inline Tensor detach(const Tensor& tensor) {
  return view_of(tensor, tensor.sizes(), tensor.strides());
}

// A parameter as a dense tensor of `type`.
inline Tensor parameter_as(const Tensor& tensor, ScalarType type) {
  return as_type(detach(tensor), type);
}
inline OptionalTensor parameter_as(const OptionalTensor& tensor, ScalarType type) {
  return tensor ? OptionalTensor(parameter_as(*tensor, type)) : std::nullopt;
}

// Raises where `tensor` is not on the device of `like`.
using DeviceCheck = void (*)(const char* op, const char* argument, const Tensor& tensor, const Tensor& like);

// Checks of an operator's arguments. Each raises in the operator's name.
struct Checks {
  const char* op;
  DeviceCheck on_device;
  const Tensor& beside;  // the tensor whose device counts

  void parameter(const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape) const {
    on_device(op, argument, tensor, beside);
    check_dtype(op, argument, tensor);
    check_shape(op, argument, tensor, shape);
  }
  void parameter(const char* argument, const OptionalTensor& tensor, const std::vector<int64_t>& shape) const {
    if (tensor) parameter(argument, *tensor, shape);
  }
  // A dense activation, or a row statistic: (..., columns) of any rank from 1.
  void activation(const char* argument, const Tensor& tensor) const {
    on_device(op, argument, tensor, beside);
    check_dtype(op, argument, tensor);
    if (tensor.dim() < 1) fail(op, argument, "a tensor of rank 1 or more", "rank 0");
    if (tensor.size(-1) < 1) fail(op, argument, "at least one channel", "shape " + describe(tensor.sizes()));
    check_contiguous(op, argument, tensor);
  }
  void like(const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type) const {
    on_device(op, argument, tensor, beside);
    check_shape(op, argument, tensor, shape);
    if (tensor.scalar_type() != type) fail(op, argument, describe(type), describe(tensor.scalar_type()));
    check_contiguous(op, argument, tensor);
  }
};

}  // namespace convnext_kernels
