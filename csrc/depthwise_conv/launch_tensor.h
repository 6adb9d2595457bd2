// Version 2 of the tuned kernels, as the rest of the room sees it: its kernels have a translation unit of their own.
#pragma once
#include "depthwise_conv/kernels.cuh"
#include "depthwise_conv/tensor_launch_plan.h"

namespace convnext_kernels::depthwise_conv {

// T: what is multiplied, 16 bits. R: of the residual and of the result, T or, with a residual, float. X: of the input,
// T or, without a residual, float: then it is rounded to T first.
template <class T, class R, class X = T>
struct TensorConvolutionParams {
  const X* x;                 // (samples, height, width, channels)
  Parameter weight;           // (channels, 7, 7)
  Parameter bias;             // (channels) or absent; with a residual there is none
  const R* residual;          // like y or null: added before the one rounding
  const float* sample_scale;  // (samples) or null: samples with 0 are not read, and y is the residual or 0 there
  R* y;                       // like x
  Images shape;               // channels and addresses allow accesses of 16 bytes
  bool flipped;               // the filter turned by 180 degrees
  TensorPlan plan;            // that exists; staged_bytes: 4 with a residual, 2 without; input_bytes: of X
  T* x_copy = nullptr;        // x rounded to T, of all samples: written where X is float
};

template <class T>
struct TensorWeightGradientParams {
  const T* grad;              // (samples, height, width, channels)
  const T* x;                 // like grad
  const float* sample_scale;  // (samples) or null: samples with 0 are not read
  float* partials;            // (row_blocks, 7 * 7 + 1, channels): sums for the weights, then the bias
  Images shape;               // channels and addresses allow accesses of 16 bytes
  TensorPlan plan;            // that exists
};

// Compiled in cuda_tensor.cu.
template <class T, class R, class X>
void launch_tensor_convolution(const char* op, const TensorConvolutionParams<T, R, X>& params, cudaStream_t stream);
template <class T>
void launch_tensor_weight_gradient(const char* op, const TensorWeightGradientParams<T>& params, cudaStream_t stream);

}  // namespace convnext_kernels::depthwise_conv
