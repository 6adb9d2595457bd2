// layer_norm on CUDA tensors: launch. Its kernels are compiled here.
#include "layer_norm/cuda_checks.cuh"
#include "layer_norm/launch.cuh"

namespace convnext_kernels {

// For other sources to launch.
template LayerNormLaunch<float, float> launch_layer_norm<float, float>;
template LayerNormLaunch<float, __half> launch_layer_norm<float, __half>;
template LayerNormLaunch<float, __nv_bfloat16> launch_layer_norm<float, __nv_bfloat16>;
template LayerNormLaunch<__half, __half> launch_layer_norm<__half, __half>;
template LayerNormLaunch<__half, float> launch_layer_norm<__half, float>;
template LayerNormLaunch<__nv_bfloat16, __nv_bfloat16> launch_layer_norm<__nv_bfloat16, __nv_bfloat16>;
template LayerNormLaunch<__nv_bfloat16, float> launch_layer_norm<__nv_bfloat16, float>;
template LayerNormLaunch<double, double> launch_layer_norm<double, double>;
template LayerNormLaunch<float, float> launch_layer_norm_normalise<float, float>;
template LayerNormLaunch<float, __half> launch_layer_norm_normalise<float, __half>;
template LayerNormLaunch<float, __nv_bfloat16> launch_layer_norm_normalise<float, __nv_bfloat16>;
template LayerNormLaunch<__half, __half> launch_layer_norm_normalise<__half, __half>;
template LayerNormLaunch<__half, float> launch_layer_norm_normalise<__half, float>;
template LayerNormLaunch<__nv_bfloat16, __nv_bfloat16> launch_layer_norm_normalise<__nv_bfloat16, __nv_bfloat16>;
template LayerNormLaunch<__nv_bfloat16, float> launch_layer_norm_normalise<__nv_bfloat16, float>;
template LayerNormLaunch<double, double> launch_layer_norm_normalise<double, double>;

namespace {

using namespace layer_norm_checks;

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              double eps, ScalarType out_dtype) {
  constexpr const char* kOp = "layer_norm";
  const auto [rows, channels] = check_activation(kOp, "x", x, x);
  const OptionalTensor weights = check_parameter(kOp, "weight", weight, x, channels);
  const OptionalTensor biases = check_parameter(kOp, "bias", bias, x, channels);
  if (!is_supported(out_dtype)) fail(kOp, "out_dtype", "float32, float64, float16 or bfloat16", describe(out_dtype));

  const CudaContext context(x);
  const ScalarType y_type = kernel_type(x.scalar_type(), out_dtype);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  const Tensor y = empty(x, shape_of(x), y_type);
  const Tensor mean = empty(x, shape_without_last(x), accumulation);
  const Tensor rstd = empty(x, shape_without_last(x), accumulation);
  dispatch_elements(x.scalar_type(), y_type, [&](auto x_element, auto y_element) {
    using T = decltype(x_element);
    using R = decltype(y_element);
    using A = Accumulation<T>;
    LayerNormParams<T, R> params;
    params.x = static_cast<const T*>(x.const_data_ptr());
    params.weight = as_parameter(weights);
    params.bias = as_parameter(biases);
    params.y = static_cast<R*>(y.mutable_data_ptr());
    params.mean = static_cast<A*>(mean.mutable_data_ptr());
    params.rstd = static_cast<A*>(rstd.mutable_data_ptr());
    params.rows = rows;
    params.channels = channels;
    params.eps = static_cast<A>(eps);
    launch_layer_norm(kOp, params, is_vector_aligned(x) && is_vector_aligned(y), context.chip(), context.stream());
  });
  return {y_type == out_dtype ? y : torch::stable::to(y, out_dtype), mean, rstd};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&convnext_kernels::layer_norm));
}
