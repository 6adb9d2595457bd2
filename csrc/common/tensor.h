// What every operator's entry needs: tensors of the stable ABI, checks whose messages name the operator, the
// argument, what was expected and what came, and dispatch over element types.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace convnext_kernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string describe(ScalarType type) {
  return torch::headeronly::toString(type);
}

inline std::string describe(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "") << numbers[i];
  out << ')';
  return out.str();
}

// Raises RuntimeError in Python.
[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error(std::string("convnext_kernels::") + op + ": argument '" + argument + "': expected " +
                           expected + ", got " + got);
}

// Raises where a call of PyTorch's C interface, `call`, failed.
inline void check_call(AOTITorchError error, const char* call) {
#ifdef STABLE_TORCH_ERROR_CODE_CHECK  // raises with PyTorch's own message; the headers of 2.11 have none
  STABLE_TORCH_ERROR_CODE_CHECK(error);
#endif
  if (error != TORCH_SUCCESS)
    throw std::runtime_error(std::string("convnext_kernels: PyTorch's ") + call + " failed; PyTorch has logged why");
}

// Calls an operator of PyTorch's: takes its arguments from `stack` and leaves its results there.
inline void call_operator(const char* name, const char* overload, StableIValue* stack) {
  check_call(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION), name);
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// fp64 accumulates in fp64, everything else in fp32.
inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor) {
  if (!is_supported(tensor.scalar_type()))
    fail(op, argument, "a tensor of float32, float64, float16 or bfloat16", describe(tensor.scalar_type()));
}

inline void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank) {
  if (tensor.dim() != rank)
    fail(op, argument, "a tensor of rank " + std::to_string(rank),
         "rank " + std::to_string(tensor.dim()) + " with shape " + describe(tensor.sizes()));
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape) {
  const torch::headeronly::IntHeaderOnlyArrayRef expected(shape.data(), shape.size());
  bool same = static_cast<size_t>(tensor.dim()) == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  if (!same) fail(op, argument, "shape " + describe(expected), "shape " + describe(tensor.sizes()));
}

inline void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, argument, "a CPU tensor like the other arguments", "a tensor on another device");
}

// Strides of a dense (N, C, H, W) tensor whose memory runs N, H, W, C. A dimension of size 1 may have any stride.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const auto size = tensor.sizes();
  const auto stride = tensor.strides();
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (size[dim] != 1 && stride[dim] != expected) return tensor.numel() == 0;
    expected *= size[dim];
  }
  return true;
}

inline void check_channels_last(const char* op, const char* argument, const Tensor& tensor) {
  check_rank(op, argument, tensor, 4);
  if (!is_channels_last(tensor))
    fail(op, argument, "a dense channels-last (NHWC) tensor", "strides " + describe(tensor.strides()));
}

inline void check_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_contiguous()) fail(op, argument, "a contiguous tensor", "strides " + describe(tensor.strides()));
}

// Fresh tensors on `like`'s device. `like` is only asked for its device, so it may be any of the arguments.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                            ScalarType type) {
  // Past the dispatcher: a small block's time is that of such calls.
  int32_t device_type, device_index;
  check_call(aoti_torch_get_device_type(like.get(), &device_type), "get_device_type");
  check_call(aoti_torch_get_device_index(like.get(), &device_index), "get_device_index");
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle fresh;
  check_call(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                      device_type, device_index, &fresh),
             "empty_strided");
  return Tensor(fresh);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0; stride *= std::max<int64_t>(shape[dim], 1)) strides[dim] = stride;
  return empty_strided(like, shape, strides, type);
}

inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), type);
}

inline Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  const int64_t channels = std::max<int64_t>(shape[1], 1), row = channels * std::max<int64_t>(shape[3], 1);
  return empty_strided(like, shape, {row * std::max<int64_t>(shape[2], 1), 1, row, channels}, type);
}

// A dense channels-last tensor of another type; a copy also where it has that type.
inline Tensor converted_channels_last(const Tensor& tensor, ScalarType type) {
  return torch::stable::to(tensor, type, std::nullopt, std::nullopt, std::nullopt, false, true,
                           MemoryFormat::ChannelsLast);
}

// The same memory in another shape, from `offset` elements on, past the dispatcher and outside of autograd.
inline Tensor view_of(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef shape,
                      torch::headeronly::IntHeaderOnlyArrayRef strides, int64_t offset = 0) {
  AtenTensorHandle view;
  check_call(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                            strides.data(), offset, &view),
             "_reinterpret_tensor");
  return Tensor(view);
}

// The same values in dense memory.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A small parameter as a dense tensor of the accumulation type.
inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return dense(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

}  // namespace convnext_kernels
