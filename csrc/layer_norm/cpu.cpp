// CPU entries of layer_norm and layer_norm_backward.
#include "common/cpu_operator.h"
#include "layer_norm/cpu_table.h"

namespace convnext_kernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              double eps, ScalarType out_dtype) {
  constexpr const char* kName = "layer_norm";
  check_activation(kName, "x", x);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  check_parameter(kName, "weight", weight, {channels});
  check_parameter(kName, "bias", bias, {channels});
  if (!is_supported(out_dtype)) fail(kName, "out_dtype", "float32, float64, float16 or bfloat16", describe(out_dtype));

  const ScalarType accumulation = accumulation_type(x.scalar_type());
  // The kernels mix fp64 with nothing.
  const ScalarType y_type = accumulation_type(out_dtype) == accumulation ? out_dtype : accumulation;
  const OptionalTensor weights = parameter_as(weight, accumulation), biases = parameter_as(bias, accumulation);
  const Tensor y = empty(x, shape_of(x), y_type);
  const Tensor mean = empty(x, shape_without_last(x), accumulation);
  const Tensor rstd = empty(x, shape_without_last(x), accumulation);

  const auto& kernels = layer_norm_kernels();
  const Elements x_data(x), y_data(y), weight_data(weights), bias_data(biases), mean_data(mean), rstd_data(rstd);
  for_each_group(row_groups(rows), [&](int64_t, int64_t first, int64_t end) {
    kernels.forward(x_data.type(), y_data.type(), end - first, channels, eps, x_data.at(first * channels),
                    weight_data.at(0), bias_data.at(0), y_data.at(first * channels), mean_data.at(first),
                    rstd_data.at(first));
  });
  return {y_type == out_dtype ? y : torch::stable::to(y, out_dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight, bool needs_x,
                                                       bool needs_weight, bool needs_bias) {
  constexpr const char* kName = "layer_norm_backward";
  check_activation(kName, "x", x);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  check_activation(kName, "grad", grad);
  check_shape(kName, "grad", grad, shape_of(x));
  check_like(kName, "mean", mean, shape_without_last(x), accumulation);
  check_like(kName, "rstd", rstd, shape_without_last(x), accumulation);
  check_parameter(kName, "weight", weight, {channels});

  const bool same = accumulation_type(grad.scalar_type()) == accumulation;
  const Tensor grads = same ? grad : torch::stable::to(detach(grad), accumulation);
  const OptionalTensor weights = parameter_as(weight, accumulation);
  const Tensor grad_x = needs_x ? empty(x, shape_of(x), x.scalar_type()) : empty(x, {0}, accumulation);
  const Tensor grad_weight = empty(x, {needs_weight ? channels : 0}, accumulation);
  const Tensor grad_bias = empty(x, {needs_bias ? channels : 0}, accumulation);
  if (!needs_x && !needs_weight && !needs_bias) return {grad_x, grad_weight, grad_bias};

  const RowGroups groups = row_groups(rows);
  ColumnSums weight_sums(x, needs_weight, groups.count, channels, accumulation);
  ColumnSums bias_sums(x, needs_bias, groups.count, channels, accumulation);
  const auto& kernels = layer_norm_kernels();
  const Elements grad_data(grads), x_data(x), mean_data(mean), rstd_data(rstd), weight_data(weights);
  const Elements grad_x_data = needs_x ? Elements(grad_x) : Elements();
  for_each_group(groups, [&](int64_t group, int64_t first, int64_t end) {
    kernels.backward(grad_data.type(), x_data.type(), end - first, channels, grad_data.at(first * channels),
                     x_data.at(first * channels), mean_data.at(first), rstd_data.at(first), weight_data.at(0),
                     grad_x_data.at(first * channels), weight_sums.part(group, true), bias_sums.part(group, true));
  });
  if (needs_weight) weight_sums.finish(groups.count, false, grad_weight);
  if (needs_bias) bias_sums.finish(groups.count, false, grad_bias);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&convnext_kernels::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&convnext_kernels::layer_norm_backward));
}
