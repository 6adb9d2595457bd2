// Every operator's schema, on one screen. The implementations are in the rooms beside this file
// (cpu.cpp, cuda.cu); shapes, fakes and derivatives are in convnext_kernels/operators/.
//
// All operators are functional: they write no argument and no result aliases one. Activations are dense
// channels-last; statistics, and gradients of parameters, come in the accumulation type (fp64 for fp64, else fp32).
// `sample_scale` (N) is the drop-path vector: 0 for a dropped sample, whose part of an intermediate result is 0.
// A gradient that was not asked for comes as an empty tensor of shape (0,).
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(convnext_kernels, m) {
  // --- depthwise convolution: x (N, C, H, W), weight (C, 1, k, k), padding k / 2 -> (N, C, ceil(H / s), ceil(W / s))
  m.def("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, Tensor? sample_scale) -> Tensor");
  // The same with stride 1 of x rounded to `dtype`, the dtype of y; x_copy is x in that dtype, of dropped samples too.
  m.def(
      "depthwise_conv2d_cast(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype, Tensor? sample_scale) "
      "-> (Tensor y, Tensor x_copy)");
  // The input has (H_out - 1) * stride + 1 + output_padding rows; `residual` (its shape) is added in the same pass.
  m.def(
      "depthwise_conv2d_input_grad(Tensor grad, Tensor weight, Tensor? residual, int stride, int[] output_padding, "
      "Tensor? sample_scale) -> Tensor");
  m.def(
      "depthwise_conv2d_weight_grad(Tensor grad, Tensor x, int kernel_size, int stride, Tensor? sample_scale) "
      "-> (Tensor grad_weight, Tensor grad_bias)");

  // --- layer normalisation over the last dimension: x (..., C), mean and rstd (...)
  m.def(
      "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool needs_x, "
      "bool needs_weight, bool needs_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  // --- GELU(x + bias): x (..., K); approximate is 'none' (exact, erf) or 'tanh'
  m.def("bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str approximate) -> (Tensor grad_x, Tensor grad_bias)");

  // --- y = residual + sample_scale * layer_scale * (GRN(GELU(LayerNorm(z) W1^T + b1)) W2^T + b2); z (N, ..., C).
  //     hidden = LayerNorm(z) W1^T + b1 (N, ..., K) where keep_hidden, else empty: the backward computes it again.
  m.def(
      "layer_norm_mlp(Tensor z, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
      "Tensor? fc1_bias, Tensor? grn_weight, Tensor? grn_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "Tensor? layer_scale, Tensor? sample_scale, float eps, str approximate, ScalarType out_dtype, bool keep_hidden) "
      "-> (Tensor y, Tensor mean, Tensor rstd, Tensor hidden)");
  // output_mask: bit i set asks for result i. The gradient of `residual` is `grad` itself.
  m.def(
      "layer_norm_mlp_backward(Tensor grad, Tensor z, Tensor mean, Tensor rstd, Tensor hidden, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor? grn_weight, Tensor? grn_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? sample_scale, str approximate, "
      "int output_mask) -> (Tensor grad_z, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_fc1_weight, "
      "Tensor grad_fc1_bias, Tensor grad_grn_weight, Tensor grad_grn_bias, Tensor grad_fc2_weight, "
      "Tensor grad_fc2_bias, Tensor grad_layer_scale)");

  // --- the whole block: composed in Python (operators/block.py) from the operators above, all of which run in
  //     `backend` (convnext_kernels/backends.py); None: in the one that is asked for at the call
  m.def(
      "convnext_block(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor? grn_weight, Tensor? grn_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor? layer_scale, Tensor? sample_scale, float eps, str approximate, "
      "ScalarType compute_dtype, ScalarType out_dtype, bool recompute, str? backend=None) "
      "-> (Tensor y, Tensor x_copy, Tensor z, Tensor mean, Tensor rstd, Tensor hidden)");
  m.def(
      "convnext_block_backward(Tensor grad, Tensor x, Tensor z, Tensor mean, Tensor rstd, Tensor hidden, "
      "Tensor conv_weight, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor? grn_weight, Tensor? grn_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, "
      "Tensor? sample_scale, str approximate, ScalarType x_dtype, int output_mask, str? backend=None) "
      "-> (Tensor grad_x, Tensor grad_conv_weight, Tensor grad_conv_bias, Tensor grad_norm_weight, "
      "Tensor grad_norm_bias, Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_grn_weight, "
      "Tensor grad_grn_bias, Tensor grad_fc2_weight, Tensor grad_fc2_bias, Tensor grad_layer_scale)");
}
