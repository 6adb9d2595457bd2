// layer_norm_backward on CUDA tensors: workspace, launch. Its kernels are compiled here.
#include "layer_norm/cuda_checks.cuh"
#include "layer_norm/launch.cuh"

namespace convnext_kernels {

// For other sources to launch.
template LayerNormPartialsLaunch<float, float> launch_layer_norm_backward_partials<float, float>;
template LayerNormPartialsLaunch<__half, float> launch_layer_norm_backward_partials<__half, float>;
template LayerNormPartialsLaunch<__nv_bfloat16, float> launch_layer_norm_backward_partials<__nv_bfloat16, float>;
template LayerNormPartialsLaunch<__half, __half> launch_layer_norm_backward_partials<__half, __half>;
template LayerNormPartialsLaunch<float, __half> launch_layer_norm_backward_partials<float, __half>;
template LayerNormPartialsLaunch<__nv_bfloat16, __nv_bfloat16>
    launch_layer_norm_backward_partials<__nv_bfloat16, __nv_bfloat16>;
template LayerNormPartialsLaunch<float, __nv_bfloat16> launch_layer_norm_backward_partials<float, __nv_bfloat16>;
template LayerNormPartialsLaunch<double, double> launch_layer_norm_backward_partials<double, double>;
template LayerNormBackwardLaunch<float, float> launch_layer_norm_backward<float, float>;
template LayerNormBackwardLaunch<__half, float> launch_layer_norm_backward<__half, float>;
template LayerNormBackwardLaunch<__nv_bfloat16, float> launch_layer_norm_backward<__nv_bfloat16, float>;
template LayerNormBackwardLaunch<__half, __half> launch_layer_norm_backward<__half, __half>;
template LayerNormBackwardLaunch<float, __half> launch_layer_norm_backward<float, __half>;
template LayerNormBackwardLaunch<__nv_bfloat16, __nv_bfloat16> launch_layer_norm_backward<__nv_bfloat16, __nv_bfloat16>;
template LayerNormBackwardLaunch<float, __nv_bfloat16> launch_layer_norm_backward<float, __nv_bfloat16>;
template LayerNormBackwardLaunch<double, double> launch_layer_norm_backward<double, double>;

namespace {

using namespace layer_norm_checks;

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight, bool needs_x,
                                                       bool needs_weight, bool needs_bias) {
  constexpr const char* kOp = "layer_norm_backward";
  const auto [rows, channels] = check_activation(kOp, "x", x, x);
  check_activation(kOp, "grad", grad, x);
  check_shape(kOp, "grad", grad, shape_of(x));
  check_statistic(kOp, "mean", mean, shape_without_last(x), x);
  check_statistic(kOp, "rstd", rstd, shape_without_last(x), x);
  const OptionalTensor weights = check_parameter(kOp, "weight", weight, x, channels);

  const CudaContext context(x);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  const ScalarType grad_type = kernel_type(x.scalar_type(), grad.scalar_type());
  const Tensor grads = grad_type == grad.scalar_type() ? grad : torch::stable::to(grad, grad_type);
  const Tensor grad_x = needs_x ? empty(x, shape_of(x), x.scalar_type()) : empty(x, {0}, accumulation);
  const LayerNormPlan plan = plan_layer_norm_backward(
      rows, channels, grads.element_size(), x.element_size(),
      is_vector_aligned(grads) && is_vector_aligned(x) && is_vector_aligned(grad_x), context.chip());
  if (plan.blocks == 0)
    return {grad_x, zeros(x, {needs_weight ? channels : 0}, accumulation),
            zeros(x, {needs_bias ? channels : 0}, accumulation)};
  const Tensor grad_weight = empty(x, {needs_weight ? channels : 0}, accumulation);
  const Tensor grad_bias = empty(x, {needs_bias ? channels : 0}, accumulation);
  const Tensor weight_partials = empty(x, {needs_weight ? plan.partial_rows() : 0, channels}, accumulation);
  const Tensor bias_partials = empty(x, {needs_bias ? plan.partial_rows() : 0, channels}, accumulation);
  dispatch_elements(x.scalar_type(), grad_type, [&](auto x_element, auto grad_element) {
    using T = decltype(x_element);
    using G = decltype(grad_element);
    using A = Accumulation<T>;
    LayerNormBackwardParams<G, T> params;
    params.grad = static_cast<const G*>(grads.const_data_ptr());
    params.x = static_cast<const T*>(x.const_data_ptr());
    params.mean = static_cast<const A*>(mean.const_data_ptr());
    params.rstd = static_cast<const A*>(rstd.const_data_ptr());
    params.weight = as_parameter(weights);
    if (needs_x) params.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    if (needs_weight) params.weight_partials = static_cast<A*>(weight_partials.mutable_data_ptr());
    if (needs_bias) params.bias_partials = static_cast<A*>(bias_partials.mutable_data_ptr());
    params.rows = rows;
    params.channels = channels;
    launch_layer_norm_backward(kOp, plan, params, static_cast<A*>(grad_weight.mutable_data_ptr()),
                               static_cast<A*>(grad_bias.mutable_data_ptr()), context.stream());
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&convnext_kernels::layer_norm_backward));
}
