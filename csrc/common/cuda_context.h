// The CUDA side of an operator's entry: the device and stream to launch on, and checks of CUDA tensors.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <string>

#include "common/chip.h"
#include "common/machine.cuh"
#include "common/tensor.h"

namespace convnext_kernels {

// Makes the tensor's device current for as long as it lives.
class CudaContext {
 public:
  explicit CudaContext(const Tensor& tensor) : guard_(tensor.get_device()) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("convnext_kernels: PyTorch gave no current stream of device " +
                               std::to_string(tensor.get_device()));
    stream_ = static_cast<cudaStream_t>(stream);
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, tensor.get_device());
      if (error != cudaSuccess)
        throw std::runtime_error("convnext_kernels: CUDA error '" + std::string(cudaGetErrorString(error)) +
                                 "' asking device " + std::to_string(tensor.get_device()) + " for its limits");
      return value;
    };
    chip_ = {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor), ask(cudaDevAttrMaxThreadsPerMultiProcessor)};
  }

  cudaStream_t stream() const { return stream_; }
  const Chip& chip() const { return chip_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Chip chip_{};
};

inline void check_cuda(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  if (!tensor.is_cuda()) fail(op, argument, "a CUDA tensor like the other arguments", "a tensor on another device");
  if (tensor.get_device() != like.get_device())
    fail(op, argument, "a tensor on device cuda:" + std::to_string(like.get_device()),
         "one on cuda:" + std::to_string(tensor.get_device()));
}

// Calls function(element) with a zero of the CUDA type of `type`, one of the four that check_dtype lets through.
template <class Function>
void dispatch_element(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(__half{});
    case ScalarType::BFloat16:
      return function(__nv_bfloat16{});
    default:
      return function(float{});
  }
}

inline Parameter as_parameter(const OptionalTensor& tensor) {
  if (!tensor) return {};
  Parameter parameter{tensor->const_data_ptr(), ElementType::kFloat};
  if (tensor->scalar_type() == ScalarType::Double) parameter.type = ElementType::kDouble;
  if (tensor->scalar_type() == ScalarType::Half) parameter.type = ElementType::kHalf;
  if (tensor->scalar_type() == ScalarType::BFloat16) parameter.type = ElementType::kBFloat16;
  return parameter;
}

inline bool is_vector_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

}  // namespace convnext_kernels
