// CPU entries of bias_gelu, layer_norm_mlp and their backwards.
#include "mlp/cpu_mlp_backward.h"
#include "mlp/cpu_mlp_forward.h"

namespace convnext_kernels {
namespace {

Tensor bias_gelu(const Tensor& x, const OptionalTensor& bias, const std::string& approximate) {
  constexpr const char* kName = "bias_gelu";
  check_activation(kName, "x", x);
  const int64_t columns = x.size(-1), rows = x.numel() / columns;
  check_parameter(kName, "bias", bias, {columns});
  const bool tanh = is_tanh(kName, approximate);

  const OptionalTensor biases = parameter_as(bias, accumulation_type(x.scalar_type()));
  const Tensor y = empty(x, shape_of(x), x.scalar_type());
  const Elements x_data(x), y_data(y), bias_data(biases);
  for_each_group(row_groups(rows), [&](int64_t, int64_t first, int64_t end) {
    mlp_kernels().gelu(x_data.type(), tanh, end - first, columns, x_data.at(first * columns), bias_data.at(0),
                       y_data.at(first * columns), nullptr);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& bias,
                                              const std::string& approximate) {
  constexpr const char* kName = "bias_gelu_backward";
  check_activation(kName, "x", x);
  check_like(kName, "grad", grad, shape_of(x), x.scalar_type());
  const int64_t columns = x.size(-1), rows = x.numel() / columns;
  check_parameter(kName, "bias", bias, {columns});
  const bool tanh = is_tanh(kName, approximate);

  const ScalarType accumulation = accumulation_type(x.scalar_type());
  const OptionalTensor biases = parameter_as(bias, accumulation);
  const Tensor grad_x = empty(x, shape_of(x), x.scalar_type());
  const Tensor grad_bias = empty(x, {bias ? columns : 0}, accumulation);
  const RowGroups groups = row_groups(rows);
  const ColumnSums bias_sums(x, bias.has_value(), groups.count, columns, accumulation);
  const Elements grad_data(grad), x_data(x), grad_x_data(grad_x), bias_data(biases);
  for_each_group(groups, [&](int64_t group, int64_t first, int64_t end) {
    HiddenRows hidden{};
    hidden.type = x_data.type();
    hidden.tanh = tanh;
    hidden.rows = end - first;
    hidden.columns = columns;
    hidden.x = x_data.at(first * columns);
    hidden.bias = bias_data.at(0);
    hidden.grad = grad_data.at(first * columns);
    hidden.grad_x = grad_x_data.at(first * columns);
    hidden.grad_sums = bias_sums.part(group, true);
    mlp_kernels().gelu_backward(hidden);
  });
  if (bias) bias_sums.finish(groups.count, false, grad_bias);
  return {grad_x, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(
    const Tensor& z, const OptionalTensor& residual, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const OptionalTensor& grn_weight,
    const OptionalTensor& grn_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, const OptionalTensor& sample_scale, double eps, const std::string& approximate,
    ScalarType out_dtype, bool keep_hidden) {
  return layer_norm_mlp_forward(z, residual,
                                {norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight,
                                 fc2_bias, layer_scale, sample_scale},
                                eps, approximate, out_dtype, keep_hidden);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_mlp_backward(
    const Tensor& grad, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& hidden,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const OptionalTensor& grn_weight, const OptionalTensor& grn_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale, const std::string& approximate, int64_t output_mask) {
  MlpBackward backward(grad, z, mean, rstd, hidden,
                       {norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias,
                        layer_scale, sample_scale},
                       approximate, output_mask);
  const auto r = backward.run();
  return {r[kGradZ],         r[kGradNormWeight], r[kGradNormBias],  r[kGradFc1Weight], r[kGradFc1Bias],
          r[kGradGrnWeight], r[kGradGrnBias],    r[kGradFc2Weight], r[kGradFc2Bias],   r[kGradLayerScale]};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&convnext_kernels::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&convnext_kernels::bias_gelu_backward));
  m.impl("layer_norm_mlp", TORCH_BOX(&convnext_kernels::layer_norm_mlp));
  m.impl("layer_norm_mlp_backward", TORCH_BOX(&convnext_kernels::layer_norm_mlp_backward));
}
