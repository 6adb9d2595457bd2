// PyTorch's own matrix products, on any device. On the CPU, call them from the operator's thread only: they bring their
// threads along, and the workers of a parallel loop do not inherit the state that PyTorch's dispatcher looks at.
#pragma once
#include "common/tensor.h"

namespace convnext_kernels {

inline Tensor transposed(const Tensor& matrix) {
  const auto size = matrix.sizes(), stride = matrix.strides();
  const int64_t sizes[] = {size[1], size[0]}, strides[] = {stride[1], stride[0]};
  return view_of(matrix, {sizes, 2}, {strides, 2});
}

// The first `rows` rows of `matrix`, from row `first` on.
inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t rows) {
  const int64_t sizes[] = {rows, matrix.size(1)};
  return view_of(matrix, {sizes, 2}, matrix.strides(), first * matrix.stride(0));
}

// result = a b. None of the tensors may be part of an autograd graph.
inline void matmul_into(const Tensor& result, const Tensor& a, const Tensor& b) {
  StableIValue stack[3] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                           torch::stable::detail::from(result)};
  call_operator("aten::mm", "out", stack);
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the returned reference
}

// result = x weight^T + bias, rounded once.
inline void linear_into(const Tensor& result, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (!bias) return matmul_into(result, x, transposed(weight));
  StableIValue stack[4] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                           torch::stable::detail::from(bias), torch::stable::detail::from(result)};
  call_operator("aten::linear", "out", stack);
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace convnext_kernels
