// From an operator's arguments to the kernels that fit them.
#pragma once
#include "depthwise_conv/kernels_convolution.cuh"
#include "depthwise_conv/kernels_simple.cuh"
#include "depthwise_conv/kernels_weight_gradient.cuh"
#include "depthwise_conv/launch_tensor.h"

namespace convnext_kernels::depthwise_conv {

// What there are tuned kernels for: a result like the input, or, with a residual, in fp32.
template <class T, class R>
constexpr bool kHasTunedKernel = !std::is_same_v<T, double> && (std::is_same_v<T, R> || std::is_same_v<R, float>);

// And which of them have a second version, on the tensor cores.
template <class T, class R>
constexpr bool kHasTensorKernel = kHasTunedKernel<T, R> && sizeof(T) == 2;

struct ConvolutionLaunch {
  bool tuned = false;
  TensorPlan tensor;  // of a tuned one; exists if it is version 2

  const char* name() const { return !tuned ? "simple" : tensor.exists() ? "tensor" : "fma"; }
};

// What runs T to R. A version that is asked for but does not take the shape, or needs more shared memory than the chip
// has, gives way to the next.
template <class T, class R>
ConvolutionLaunch plan_convolution(const Images& shape, int kernel_size, int stride, bool residual, bool bias,
                                   bool aligned, const Chip& chip, Version version) {
  ConvolutionLaunch plan;
  const int64_t narrowest = std::min(sizeof(T), sizeof(R));
  plan.tuned = kHasTunedKernel<T, R> && (residual ? !bias : std::is_same_v<T, R>) &&
               is_tuned(kernel_size, stride, shape.channels, narrowest, aligned);
  if (!plan.tuned || !kHasTensorKernel<T, R> || version == Version::kFma) return plan;
  const TensorPlan tensor =
      plan_tensor(Kind::kConvolution, shape.samples, shape.channels, shape.height, shape.width, residual ? 4 : 2, chip);
  if (version == Version::kTensor || prefers_tensor(Kind::kConvolution, tensor, shape.height, shape.width, chip))
    plan.tensor = tensor;
  return plan;
}

// All of `params` is given but the plan. `aligned`: x, residual and y begin at multiples of 16 bytes. Does nothing for
// no samples.
template <class T, class R>
void launch_convolution(const char* op, SimpleConvolutionParams<T, R> params, bool aligned, const Chip& chip,
                        cudaStream_t stream, Version version = Version::kChosen) {
  const Images& shape = params.shape;
  const ConvolutionLaunch plan =
      plan_convolution<T, R>(shape, params.kernel_size, params.stride, params.residual != nullptr,
                             params.bias.data != nullptr, aligned, chip, version);
  if constexpr (kHasTensorKernel<T, R>) {
    if (plan.tensor.exists())
      return launch_tensor_convolution(
          op,
          TensorConvolutionParams<T, R>{params.x, params.weight, params.bias, params.residual, params.sample_scale,
                                        params.y, shape, params.transposed, plan.tensor},
          stream);
  }
  if constexpr (kHasTunedKernel<T, R>) {
    if (plan.tuned) {
      ConvolutionParams<T, R> tuned{};
      tuned.x = params.x;
      tuned.weight = params.weight;
      tuned.bias = params.bias;
      tuned.residual = params.residual;
      tuned.sample_scale = params.sample_scale;
      tuned.y = params.y;
      tuned.shape = shape;
      tuned.flipped = params.transposed;
      tuned.plan =
          plan_tiles(Kind::kConvolution, shape.samples, shape.channels, shape.height, shape.width, sizeof(T), chip);
      return launch_tuned_convolution(op, tuned, stream);
    }
  }
  params.plan = plan_simple(shape.samples, shape.channels, params.result_height, chip);
  launch_simple_convolution(op, params, stream);
}

// The plan of a convolution that reads fp32, rounds it to T and writes what it rounded; none exists where a pass that
// rounds comes first. Only version 2 has such a kernel, and only where it is what would run after that pass: the bits
// are the same.
template <class T>
TensorPlan plan_rounding_convolution(const Images& shape, int kernel_size, bool bias, bool aligned, const Chip& chip,
                                     Version version) {
  if constexpr (kHasTensorKernel<T, T>) {
    const bool tensor =
        plan_convolution<T, T>(shape, kernel_size, 1, false, bias, aligned, chip, version).tensor.exists();
    if (tensor)
      return plan_tensor(Kind::kConvolution, shape.samples, shape.channels, shape.height, shape.width, 2, chip,
                         sizeof(float));
  }
  return {};
}

struct WeightGradientLaunch {
  bool tuned = false;
  TensorPlan tensor;  // of a tuned one; exists if it is version 2
  TilePlan tiles;
  SimplePlan simple;

  // Rows of (kernel_size^2 + 1) * channels elements in the workspace; 0: there is nothing to launch.
  int64_t partial_rows() const {
    return !tuned ? simple.row_blocks : tensor.exists() ? tensor.row_blocks : tiles.row_blocks;
  }
  const char* name() const { return !tuned ? "simple" : tensor.exists() ? "tensor" : "fma"; }
};

// `shape` of x; `aligned`: x and grad begin at multiples of 16 bytes. Of versions see plan_convolution.
inline WeightGradientLaunch plan_weight_gradient(const Images& shape, int result_height, int kernel_size, int stride,
                                                 int64_t element_bytes, bool aligned, const Chip& chip,
                                                 Version version = Version::kChosen) {
  constexpr Kind kKind = Kind::kWeightGradient;
  WeightGradientLaunch plan;
  plan.tuned = is_tuned(kernel_size, stride, shape.channels, element_bytes, aligned);
  if (!plan.tuned) {
    plan.simple = plan_simple(shape.samples, shape.channels, result_height, chip);
    return plan;
  }
  if (element_bytes == 2 && version != Version::kFma) {
    const TensorPlan tensor = plan_tensor(kKind, shape.samples, shape.channels, shape.height, shape.width, 2, chip);
    if (version == Version::kTensor || prefers_tensor(kKind, tensor, shape.height, shape.width, chip))
      plan.tensor = tensor;
  }
  if (!plan.tensor.exists())
    plan.tiles = plan_tiles(kKind, shape.samples, shape.channels, shape.height, shape.width, element_bytes, chip);
  return plan;
}

// All of `params` is given but the plan. Does nothing, also not to the gradients, where plan.partial_rows() is 0.
template <class T>
void launch_weight_gradient(const char* op, const WeightGradientLaunch& plan, SimpleWeightGradientParams<T> params,
                            Accumulation<T>* grad_weight, Accumulation<T>* grad_bias, cudaStream_t stream) {
  if (plan.partial_rows() == 0) return;
  const auto launch_first_half = [&] {
    if constexpr (sizeof(T) == 2) {
      if (plan.tensor.exists())
        return launch_tensor_weight_gradient(op,
                                             TensorWeightGradientParams<T>{params.grad, params.x, params.sample_scale,
                                                                           params.partials, params.shape, plan.tensor},
                                             stream);
    }
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.tuned)
        return launch_tuned_weight_gradient(op,
                                            WeightGradientParams<T>{params.grad, params.x, params.sample_scale,
                                                                    params.partials, params.shape, plan.tiles},
                                            stream);
    }
    params.plan = plan.simple;
    launch_simple_weight_gradient(op, params, stream);
  };
  launch_first_half();
  launch_sum_partials(op, params.partials, grad_weight, grad_bias, plan.partial_rows(),
                      params.kernel_size * params.kernel_size, params.shape.channels, stream);
}

}  // namespace convnext_kernels::depthwise_conv
