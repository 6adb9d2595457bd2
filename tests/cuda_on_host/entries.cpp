// Makes the CUDA entries (csrc/*/cuda*.cu, unchanged, compiled by a C++ compiler) the CPU implementation of their
// operators, so that PyTorch calls them with CPU tensors and the engine executes their kernels.
//
// The entries see the GPU through a few functions of PyTorch's C interface and of the CUDA runtime. Those are defined
// here, and the linker keeps the names inside this library. What an entry allocates holds NaN at first. When the
// process ends, the file that CUDA_ON_HOST_LAUNCHES names gets a line "operator launches" for each operator that
// launched.
//
//   CUDA_ON_HOST_SCHEDULE       forward (default), reverse, random or greedy (engine.h)
//   CUDA_ON_HOST_APPROXIMATION  exact (default), low, high or mixed
//   CUDA_ON_HOST_MULTIPROCESSORS  how many the chip has (3)
//   CUDA_ON_HOST_SHARED_KIB     shared memory that a block is told it may have; the engine gives 99 KiB (default)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "engine.h"

namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

template <class Value>
Value choose(const char* name, const std::map<std::string, Value>& values, const char* otherwise) {
  const auto found = values.find(setting(name, otherwise));
  if (found == values.end()) throw std::runtime_error(std::string(name) + ": unknown value " + setting(name, ""));
  return found->second;
}

// Reads the settings when the library is loaded and writes the launches when the process ends.
struct Session {
  Session() {
    using emu::Approximation;
    using emu::Order;
    emu::Config& config = emu::config();
    const std::string schedule = setting("CUDA_ON_HOST_SCHEDULE", "forward");
    config.greedy = schedule == "greedy";
    config.order = choose<Order>("CUDA_ON_HOST_SCHEDULE",
                                 {{"forward", Order::kForward},
                                  {"reverse", Order::kReverse},
                                  {"random", Order::kRandom},
                                  {"greedy", Order::kForward}},
                                 "forward");
    config.approximation = choose<Approximation>("CUDA_ON_HOST_APPROXIMATION",
                                                 {{"exact", Approximation::kExact},
                                                  {"low", Approximation::kLow},
                                                  {"high", Approximation::kHigh},
                                                  {"mixed", Approximation::kMixed}},
                                                 "exact");
  }
  ~Session() {
    const std::string path = setting("CUDA_ON_HOST_LAUNCHES", "");
    if (path.empty()) return;
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (!file) {
      std::perror(path.c_str());
      return;
    }
    for (const auto& [name, count] : emu::launches()) std::fprintf(file, "%s %zu\n", name.c_str(), count);
    std::fclose(file);
  }
} session;

// PyTorch's own function of this name.
template <class Function>
Function* original(const char* name) {
  static void* const library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  void* const symbol = library ? dlsym(library, name) : nullptr;
  if (!symbol) {
    std::fprintf(stderr, "cuda_on_host: PyTorch has no function %s\n", name);
    std::abort();
  }
  return reinterpret_cast<Function*>(symbol);
}

AOTITorchError call_pytorch(const char* op, const char* overload, StableIValue* stack, uint64_t version) {
  static auto* const function = original<decltype(torch_call_dispatcher)>("torch_call_dispatcher");
  return function(op, overload, stack, version);
}

// mm(a, b, out_dtype, out=out) has no CPU kernel: the operands are widened instead.
AOTITorchError multiply_wide(StableIValue* stack, uint64_t version) {
  const Tensor a = to<Tensor>(stack[0]), b = to<Tensor>(stack[1]);
  const auto type = to<torch::headeronly::ScalarType>(stack[2]);
  stack[0] = from(torch::stable::to(a, type));
  stack[1] = from(torch::stable::to(b, type));
  stack[2] = stack[3];
  return call_pytorch("aten::mm", "out", stack, version);
}

// Every type's bytes of ones are NaN.
void forget_contents(AtenTensorHandle tensor) {
  int64_t bytes = 0;
  void* data = nullptr;
  if (aoti_torch_get_storage_size(tensor, &bytes) == AOTI_TORCH_SUCCESS && bytes > 0 &&
      aoti_torch_get_data_ptr(tensor, &data) == AOTI_TORCH_SUCCESS)
    std::memset(data, 0xFF, static_cast<size_t>(bytes));
}

}  // namespace

extern "C" {

// --- the CUDA runtime

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      // Few by default: small tensors are spread over several rounds of blocks.
      *value = std::stoi(setting("CUDA_ON_HOST_MULTIPROCESSORS", "3"));
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = std::stoi(setting("CUDA_ON_HOST_SHARED_KIB", "99")) * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = (std::stoi(setting("CUDA_ON_HOST_SHARED_KIB", "99")) + 1) * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 1536;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the host has no such attribute";
}

// --- PyTorch's C interface

// A CPU tensor is a CUDA tensor in here.
int32_t aoti_torch_device_type_cuda() {
  return aoti_torch_device_type_cpu();
}

AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library) {
  static auto* const function = original<decltype(aoti_torch_library_init_impl)>("aoti_torch_library_init_impl");
  return function(ns, std::strcmp(key, "CUDA") ? key : "CPU", file, line, library);
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack, uint64_t version) {
  if (!std::strcmp(op, "aten::mm") && !std::strcmp(overload, "dtype_out")) return multiply_wide(stack, version);
  return call_pytorch(op, overload, stack, version);
}

AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* fresh) {
  static auto* const function = original<decltype(aoti_torch_empty_strided)>("aoti_torch_empty_strided");
  const AOTITorchError error = function(dims, sizes, strides, dtype, device_type, device_index, fresh);
  if (error == AOTI_TORCH_SUCCESS) forget_contents(*fresh);
  return error;
}

}  // extern "C"
