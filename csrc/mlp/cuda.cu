// bias_gelu and its backward on CUDA tensors: checks, workspace, launch.
#include "common/cuda_context.h"
#include "mlp/kernels.cuh"

namespace convnext_kernels {
namespace {

Gelu check_gelu(const char* op, const std::string& approximate) {
  if (approximate == "none") return Gelu::kErf;
  if (approximate == "tanh") return Gelu::kTanh;
  fail(op, "approximate", "'none' or 'tanh'", "'" + approximate + "'");
}

// A (..., K) tensor as rows of K.
struct Matrix {
  int64_t rows, columns;
};

Matrix check_matrix(const char* op, const Tensor& x) {
  check_dtype(op, "x", x);
  check_contiguous(op, "x", x);
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1) fail(op, "x", "shape (..., K) with K >= 1", describe(x.sizes()));
  const int64_t columns = x.size(x.dim() - 1);
  return {x.numel() / columns, columns};
}

// The bias as it will be read: contiguous.
OptionalTensor check_bias(const char* op, const OptionalTensor& bias, const Tensor& x, int64_t columns) {
  if (!bias) return std::nullopt;
  check_cuda(op, "bias", *bias, x);
  check_dtype(op, "bias", *bias);
  check_shape(op, "bias", *bias, {columns});
  return torch::stable::contiguous(*bias);
}

std::vector<int64_t> shape_of(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

Tensor bias_gelu(const Tensor& x, const OptionalTensor& bias, const std::string& approximate) {
  constexpr const char* kOp = "bias_gelu";
  const Gelu kind = check_gelu(kOp, approximate);
  check_cuda(kOp, "x", x, x);
  const Matrix matrix = check_matrix(kOp, x);
  const OptionalTensor dense_bias = check_bias(kOp, bias, x, matrix.columns);
  const CudaContext context(x);
  Tensor y = empty(x, shape_of(x), x.scalar_type());
  const RowPassPlan plan = plan_bias_gelu(false, matrix.rows, matrix.columns, x.element_size(), is_vector_aligned(x),
                                          context.chip().multiprocessors);
  dispatch_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const BiasGeluParams<T> params{static_cast<const T*>(x.const_data_ptr()), as_parameter(dense_bias),
                                   static_cast<T*>(y.mutable_data_ptr()), matrix.rows, matrix.columns};
    launch_bias_gelu(plan, params, kind, context.stream());
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& bias,
                                              const std::string& approximate) {
  constexpr const char* kOp = "bias_gelu_backward";
  const Gelu kind = check_gelu(kOp, approximate);
  check_cuda(kOp, "x", x, x);
  const Matrix matrix = check_matrix(kOp, x);
  check_cuda(kOp, "grad", grad, x);
  if (grad.scalar_type() != x.scalar_type())
    fail(kOp, "grad", "x's dtype " + describe(x.scalar_type()), describe(grad.scalar_type()));
  check_shape(kOp, "grad", grad, shape_of(x));
  check_contiguous(kOp, "grad", grad);
  const OptionalTensor dense_bias = check_bias(kOp, bias, x, matrix.columns);
  const CudaContext context(x);
  const ScalarType sum_type = accumulation_type(x.scalar_type());
  Tensor grad_x = empty(x, shape_of(x), x.scalar_type());
  const RowPassPlan plan =
      plan_bias_gelu(true, matrix.rows, matrix.columns, x.element_size(),
                     is_vector_aligned(x) && is_vector_aligned(grad), context.chip().multiprocessors);
  if (plan.row_blocks == 0) return {grad_x, zeros(x, {bias ? matrix.columns : 0}, sum_type)};
  Tensor grad_bias = empty(x, {bias ? matrix.columns : 0}, sum_type);
  Tensor partials = empty(x, {bias ? plan.row_blocks : 0, matrix.columns}, sum_type);
  dispatch_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulation<T>;
    const BiasGeluBackwardParams<T> params{static_cast<const T*>(grad.const_data_ptr()),
                                           static_cast<const T*>(x.const_data_ptr()),
                                           as_parameter(dense_bias),
                                           static_cast<T*>(grad_x.mutable_data_ptr()),
                                           bias ? static_cast<A*>(partials.mutable_data_ptr()) : nullptr,
                                           matrix.rows,
                                           matrix.columns};
    launch_bias_gelu_backward(plan, params, static_cast<A*>(grad_bias.mutable_data_ptr()), kind, context.stream());
  });
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("bias_gelu", TORCH_BOX(&convnext_kernels::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&convnext_kernels::bias_gelu_backward));
}
