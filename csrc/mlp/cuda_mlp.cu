// layer_norm_mlp and its backward on CUDA tensors.
#include "mlp/cuda_mlp_backward.cuh"
#include "mlp/cuda_mlp_forward.cuh"

namespace convnext_kernels {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(
    const Tensor& z, const OptionalTensor& residual, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const OptionalTensor& grn_weight,
    const OptionalTensor& grn_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, const OptionalTensor& sample_scale, double eps, const std::string& approximate,
    ScalarType out_dtype, bool keep_hidden) {
  const CudaMlp mlp("layer_norm_mlp", z,
                    {norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias,
                     layer_scale, sample_scale},
                    approximate);
  mlp.check_forward(residual, out_dtype);
  const ScalarType y_type = accumulation_type(out_dtype) == mlp.accumulation ? out_dtype : mlp.accumulation;
  std::tuple<Tensor, Tensor, Tensor, Tensor> results;
  dispatch_element(mlp.type, [&](auto element) {
    CudaMlpForward<decltype(element)> forward(mlp, z, residual, eps, y_type, keep_hidden);
    forward.run();
    results = forward.results(out_dtype);
  });
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_mlp_backward(
    const Tensor& grad, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& hidden,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const OptionalTensor& grn_weight, const OptionalTensor& grn_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale, const std::string& approximate, int64_t output_mask) {
  const CudaMlp mlp("layer_norm_mlp_backward", z,
                    {norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias,
                     layer_scale, sample_scale},
                    approximate);
  mlp.check_backward(grad, mean, rstd, hidden, output_mask);
  const bool same = accumulation_type(grad.scalar_type()) == mlp.accumulation;
  const Tensor used_grad = same ? grad : torch::stable::to(detach(grad), mlp.accumulation);
  std::vector<Tensor> r;
  dispatch_element(mlp.type, [&](auto element) {
    r = CudaMlpBackward<decltype(element)>(mlp, used_grad, z, mean, rstd, hidden, output_mask).run();
  });
  return {r[kGradZ],         r[kGradNormWeight], r[kGradNormBias],  r[kGradFc1Weight], r[kGradFc1Bias],
          r[kGradGrnWeight], r[kGradGrnBias],    r[kGradFc2Weight], r[kGradFc2Bias],   r[kGradLayerScale]};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("layer_norm_mlp", TORCH_BOX(&convnext_kernels::layer_norm_mlp));
  m.impl("layer_norm_mlp_backward", TORCH_BOX(&convnext_kernels::layer_norm_mlp_backward));
}
