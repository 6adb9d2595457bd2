// The depthwise convolution's operators on CUDA tensors: checks, workspace, launch.
#include <cstdlib>

#include "common/cuda_context.h"
#include "depthwise_conv/launch.cuh"
#include "depthwise_conv/plan.h"

namespace convnext_kernels {
namespace {

using namespace depthwise_conv;

// --- checks

// Grids and 32-bit positions inside an image have room for as much.
constexpr int64_t kMostInOneDimension = 1 << 24;

Images check_images(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  check_cuda(op, argument, tensor, like);
  check_dtype(op, argument, tensor);
  check_channels_last(op, argument, tensor);
  for (int dim = 1; dim < 4; ++dim) {
    if (tensor.size(dim) < 1)
      fail(op, argument, "at least one channel, row and column", "shape " + describe(tensor.sizes()));
    if (tensor.size(dim) > kMostInOneDimension)
      fail(op, argument, "at most 2^24 channels, rows and columns", "shape " + describe(tensor.sizes()));
  }
  return {tensor.size(0), static_cast<int>(tensor.size(2)), static_cast<int>(tensor.size(3)),
          static_cast<int>(tensor.size(1))};
}

void check_stride(const char* op, int64_t stride) {
  if (!is_supported_stride(stride)) fail(op, "stride", "1 or 2", std::to_string(stride));
}

void check_kernel_size(const char* op, const char* argument, int64_t size) {
  if (!is_supported_kernel_size(size)) fail(op, argument, "kernel size 3, 5, 7, 9 or 11", std::to_string(size));
}

// The weight as it will be read: contiguous.
Tensor check_weight(const char* op, const Tensor& weight, const Tensor& like, int64_t channels) {
  check_cuda(op, "weight", weight, like);
  check_dtype(op, "weight", weight);
  check_rank(op, "weight", weight, 4);
  check_kernel_size(op, "weight", weight.size(2));
  check_shape(op, "weight", weight, {channels, 1, weight.size(2), weight.size(2)});
  return torch::stable::contiguous(weight);
}

// Likewise.
OptionalTensor check_bias(const char* op, const OptionalTensor& bias, const Tensor& like, int64_t channels) {
  if (!bias) return std::nullopt;
  check_cuda(op, "bias", *bias, like);
  check_dtype(op, "bias", *bias);
  check_shape(op, "bias", *bias, {channels});
  return torch::stable::contiguous(*bias);
}

// `type`: what the convolution computes with.
void check_sample_scale(const char* op, const OptionalTensor& sample_scale, const Tensor& like, ScalarType type) {
  if (!sample_scale) return;
  const ScalarType accumulation = accumulation_type(type);
  check_cuda(op, "sample_scale", *sample_scale, like);
  check_shape(op, "sample_scale", *sample_scale, {like.size(0)});
  if (sample_scale->scalar_type() != accumulation)
    fail(op, "sample_scale", describe(accumulation), describe(sample_scale->scalar_type()));
  check_contiguous(op, "sample_scale", *sample_scale);
}

// Tests and benchmarks compare the versions of the tuned kernels: the environment's word goes before the plan's choice
// wherever the version that it asks for takes the shape.
Version asked_version(const char* op) {
  constexpr const char* kVariable = "CONVNEXT_KERNELS_DEPTHWISE_CONV";
  const char* const value = std::getenv(kVariable);
  const std::string name = value ? value : "";
  if (name == "fma") return Version::kFma;
  if (name == "tensor") return Version::kTensor;
  if (!name.empty() && name != "auto") fail(op, kVariable, "auto, fma or tensor", "'" + name + "'");
  return Version::kChosen;
}

// --- launches

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// What the convolution and its input's gradient have in common, without types.
struct Convolution {
  const char* op;
  const Tensor& x;
  Tensor weight;
  OptionalTensor bias, residual, sample_scale;
  const Tensor& y;
  Images shape;
  int64_t stride;
  bool transposed;
};

template <class T, class R>
void run_convolution_as(const Convolution& c, const CudaContext& context) {
  SimpleConvolutionParams<T, R> params{};
  params.x = static_cast<const T*>(c.x.const_data_ptr());
  params.weight = as_parameter(c.weight);
  params.bias = as_parameter(c.bias);
  params.residual = data_or_null<R>(c.residual);
  params.sample_scale = data_or_null<Accumulation<T>>(c.sample_scale);
  params.y = static_cast<R*>(c.y.mutable_data_ptr());
  params.shape = c.shape;
  params.result_height = static_cast<int>(c.y.size(2));
  params.result_width = static_cast<int>(c.y.size(3));
  params.kernel_size = static_cast<int>(c.weight.size(2));
  params.stride = static_cast<int>(c.stride);
  params.transposed = c.transposed;
  const bool aligned =
      is_vector_aligned(c.x) && is_vector_aligned(c.y) && (!c.residual || is_vector_aligned(*c.residual));
  launch_convolution(c.op, params, aligned, context.chip(), context.stream(), asked_version(c.op));
}

void run_convolution(const Convolution& c, const CudaContext& context) {
  dispatch_element(c.x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, double>) {
      run_convolution_as<double, double>(c, context);
    } else {
      dispatch_element(c.y.scalar_type(), [&](auto result) {
        using R = decltype(result);
        if constexpr (!std::is_same_v<R, double>) run_convolution_as<T, R>(c, context);
      });
    }
  });
}

// --- operators

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t stride,
                        const OptionalTensor& sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d";
  const Images shape = check_images(kOp, "x", x, x);
  const Tensor dense_weight = check_weight(kOp, weight, x, shape.channels);
  const OptionalTensor dense_bias = check_bias(kOp, bias, x, shape.channels);
  check_stride(kOp, stride);
  check_sample_scale(kOp, sample_scale, x, x.scalar_type());
  const CudaContext context(x);
  const Tensor y = empty_channels_last(
      x, {shape.samples, shape.channels, output_size(shape.height, stride), output_size(shape.width, stride)},
      x.scalar_type());
  run_convolution({kOp, x, dense_weight, dense_bias, std::nullopt, sample_scale, y, shape, stride, false}, context);
  return y;
}

// The cast and the convolution in one pass, where there is a kernel that takes this.
template <class T>
bool run_rounding_convolution(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& sample_scale, const Tensor& y, const Tensor& x_copy,
                              const Images& shape, const CudaContext& context) {
  const bool aligned = is_vector_aligned(x) && is_vector_aligned(y) && is_vector_aligned(x_copy);
  const TensorPlan plan = plan_rounding_convolution<T>(shape, static_cast<int>(weight.size(2)), bias.has_value(),
                                                       aligned, context.chip(), asked_version(op));
  if (!plan.exists()) return false;
  TensorConvolutionParams<T, T, float> params{};
  params.x = static_cast<const float*>(x.const_data_ptr());
  params.weight = as_parameter(weight);
  params.bias = as_parameter(bias);
  params.sample_scale = data_or_null<float>(sample_scale);
  params.y = static_cast<T*>(y.mutable_data_ptr());
  params.shape = shape;
  params.plan = plan;
  params.x_copy = static_cast<T*>(x_copy.mutable_data_ptr());
  launch_tensor_convolution(op, params, context.stream());
  return true;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_cast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                 ScalarType dtype, const OptionalTensor& sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d_cast";
  const Images shape = check_images(kOp, "x", x, x);
  const Tensor dense_weight = check_weight(kOp, weight, x, shape.channels);
  const OptionalTensor dense_bias = check_bias(kOp, bias, x, shape.channels);
  if (!is_supported(dtype)) fail(kOp, "dtype", "float32, float64, float16 or bfloat16", describe(dtype));
  check_sample_scale(kOp, sample_scale, x, dtype);
  const CudaContext context(x);
  const Tensor y = empty_channels_last(x, {shape.samples, shape.channels, shape.height, shape.width}, dtype);
  if (x.scalar_type() == ScalarType::Float && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16)) {
    const Tensor x_copy = empty_channels_last(x, {shape.samples, shape.channels, shape.height, shape.width}, dtype);
    const auto run = [&](auto element) {
      return run_rounding_convolution<decltype(element)>(kOp, x, dense_weight, dense_bias, sample_scale, y, x_copy,
                                                         shape, context);
    };
    if (dtype == ScalarType::Half ? run(__half{}) : run(__nv_bfloat16{})) return {y, x_copy};
  }
  const Tensor x_copy = converted_channels_last(x, dtype);
  run_convolution({kOp, x_copy, dense_weight, dense_bias, std::nullopt, sample_scale, y, shape, 1, false}, context);
  return {y, x_copy};
}

Tensor depthwise_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const OptionalTensor& residual,
                                   int64_t stride, std::vector<int64_t> output_padding,
                                   const OptionalTensor& sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d_input_grad";
  const Images shape = check_images(kOp, "grad", grad, grad);
  const Tensor dense_weight = check_weight(kOp, weight, grad, shape.channels);
  check_stride(kOp, stride);
  if (output_padding.size() != 2 || std::min(output_padding[0], output_padding[1]) < 0 ||
      std::max(output_padding[0], output_padding[1]) >= stride)
    fail(kOp, "output_padding", "two numbers from 0 to stride - 1",
         describe(torch::headeronly::IntHeaderOnlyArrayRef(output_padding.data(), output_padding.size())));
  const std::vector<int64_t> result_shape = {shape.samples, shape.channels,
                                             (shape.height - 1) * stride + 1 + output_padding[0],
                                             (shape.width - 1) * stride + 1 + output_padding[1]};
  ScalarType type = grad.scalar_type();
  if (residual) {
    check_images(kOp, "residual", *residual, grad);
    check_shape(kOp, "residual", *residual, result_shape);
    type = residual->scalar_type();
    if (accumulation_type(type) != accumulation_type(grad.scalar_type()))
      fail(kOp, "residual", "float64 where grad is and only there", describe(type));
  }
  check_sample_scale(kOp, sample_scale, grad, grad.scalar_type());
  const CudaContext context(grad);
  const Tensor result = empty_channels_last(grad, result_shape, type);
  run_convolution({kOp, grad, dense_weight, std::nullopt, residual, sample_scale, result, shape, stride, true},
                  context);
  return result;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_weight_grad(const Tensor& grad, const Tensor& x, int64_t kernel_size,
                                                        int64_t stride, const OptionalTensor& sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d_weight_grad";
  const Images shape = check_images(kOp, "x", x, x);
  const Images result_shape = check_images(kOp, "grad", grad, x);
  if (grad.scalar_type() != x.scalar_type())
    fail(kOp, "grad", "x's dtype " + describe(x.scalar_type()), describe(grad.scalar_type()));
  check_kernel_size(kOp, "kernel_size", kernel_size);
  check_stride(kOp, stride);
  check_shape(kOp, "grad", grad,
              {shape.samples, shape.channels, output_size(shape.height, stride), output_size(shape.width, stride)});
  check_sample_scale(kOp, sample_scale, x, x.scalar_type());
  const CudaContext context(x);
  const ScalarType type = accumulation_type(x.scalar_type());
  const std::vector<int64_t> weight_shape = {shape.channels, 1, kernel_size, kernel_size};
  const WeightGradientLaunch plan =
      plan_weight_gradient(shape, result_shape.height, static_cast<int>(kernel_size), static_cast<int>(stride),
                           static_cast<int64_t>(x.element_size()), is_vector_aligned(x) && is_vector_aligned(grad),
                           context.chip(), asked_version(kOp));
  if (plan.partial_rows() == 0) return {zeros(x, weight_shape, type), zeros(x, {shape.channels}, type)};
  const Tensor grad_weight = empty(x, weight_shape, type), grad_bias = empty(x, {shape.channels}, type);
  const Tensor partials = empty(x, {plan.partial_rows(), kernel_size * kernel_size + 1, shape.channels}, type);
  dispatch_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulation<T>;
    SimpleWeightGradientParams<T> params{};
    params.grad = static_cast<const T*>(grad.const_data_ptr());
    params.x = static_cast<const T*>(x.const_data_ptr());
    params.sample_scale = data_or_null<A>(sample_scale);
    params.partials = static_cast<A*>(partials.mutable_data_ptr());
    params.shape = shape;
    params.result_height = result_shape.height;
    params.result_width = result_shape.width;
    params.kernel_size = static_cast<int>(kernel_size);
    params.stride = static_cast<int>(stride);
    launch_weight_gradient(kOp, plan, params, static_cast<A*>(grad_weight.mutable_data_ptr()),
                           static_cast<A*>(grad_bias.mutable_data_ptr()), context.stream());
  });
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&convnext_kernels::depthwise_conv2d));
  m.impl("depthwise_conv2d_cast", TORCH_BOX(&convnext_kernels::depthwise_conv2d_cast));
  m.impl("depthwise_conv2d_input_grad", TORCH_BOX(&convnext_kernels::depthwise_conv2d_input_grad));
  m.impl("depthwise_conv2d_weight_grad", TORCH_BOX(&convnext_kernels::depthwise_conv2d_weight_grad));
}
