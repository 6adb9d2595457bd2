// A CUDA driver for a machine without a GPU: a libcuda.so.1 with what Triton's own launcher calls. Modules load,
// kernels are launched, each launch and tensor map is checked against the limits of a chip as the driver would check
// it, and written down. Nothing is executed. Device pointers are the host's, so that CPU tensors can be handed in.
//
// Sources: CUDA Driver API, "Tensor Map Object Management" and "Execution Control"; CUDA C++ Programming Guide,
// "Compute Capabilities".
#include <cuda.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace {

using ParameterSizes = std::vector<unsigned>;  // bytes, in the order of the parameters

struct Module {
  std::map<std::string, ParameterSizes> kernels;
};

struct Function {
  std::string name;
  ParameterSizes parameters;
  int dynamic_shared = 48 * 1024;  // what a launch may ask for until cuFuncSetAttribute raises it
};

struct Record {
  const char* name;
  const Function* function;
  unsigned grid[3];
  unsigned threads;
  unsigned shared;
  std::uint64_t stream;
  const char* parameters;  // one behind the other, without padding
  std::uint64_t parameter_bytes;
};

constexpr unsigned kMostGridX = 2147483647;
constexpr unsigned kMostGridYZ = 65535;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostBox = 256;
constexpr unsigned kTmaAlignment = 16;

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

const int kCapability = setting("CUDA_STUB_CAPABILITY", 90);
const int kSharedOptin = 1024 * setting("CUDA_STUB_SHARED_KIB", 227);

// Deques: what was handed out stays where it is.
std::deque<Module> modules;
std::deque<Function> functions;
std::deque<Record> records;
std::deque<std::string> parameter_values;
int tensor_maps = 0;
CUcontext current_context = nullptr;
const char* last_error = "an error of no name";

CUresult refuse(const char* reason) {
  last_error = reason;
  return CUDA_ERROR_INVALID_VALUE;
}

// The kernels of a cubin: its sections .nv.info.NAME hold attributes, of which KPARAM_INFO describes a parameter.
// Layout as nvdisasm and cuobjdump print it: format, attribute, then a value of 2 bytes or that many bytes of payload.
Module read_cubin(const char* image) {
  constexpr unsigned char kPayload = 4, kParameterInfo = 0x17;
  Module module;
  const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header.e_shoff);
  const char* names = image + sections[header.e_shstrndx].sh_offset;
  const std::string prefix = ".nv.info.";
  for (int i = 0; i < header.e_shnum; ++i) {
    const std::string name = names + sections[i].sh_name;
    if (name.rfind(prefix, 0) != 0) continue;
    ParameterSizes& sizes = module.kernels[name.substr(prefix.size())];
    const char* at = image + sections[i].sh_offset;
    for (const char* end = at + sections[i].sh_size; at < end;) {
      std::uint16_t size;
      std::memcpy(&size, at + 2, sizeof size);
      const bool has_payload = at[0] == kPayload;
      if (has_payload && at[1] == kParameterInfo) {
        std::uint16_t ordinal;
        std::uint32_t bits;
        std::memcpy(&ordinal, at + 8, sizeof ordinal);
        std::memcpy(&bits, at + 12, sizeof bits);
        if (sizes.size() <= ordinal) sizes.resize(ordinal + 1);
        sizes[ordinal] = bits >> 18;
      }
      at += 4 + (has_payload ? size : 0);
    }
  }
  return module;
}

}  // namespace

extern "C" {

// --- what the tests read

int stub_launches() {
  return static_cast<int>(records.size());
}
const Record* stub_launch(int i) {
  return &records[i];
}
int stub_modules() {
  return static_cast<int>(modules.size());
}
int stub_tensor_maps() {
  return tensor_maps;
}

// --- device and context

CUresult cuInit(unsigned) {
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current_context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current_context = context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = reinterpret_cast<CUcontext>(&current_context);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) {
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = last_error;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = kCapability / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = kCapability % 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = kSharedOptin;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = kSharedOptin + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 1;
      break;
  }
  return CUDA_SUCCESS;
}

// --- modules and functions

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (std::memcmp(image, ELFMAG, SELFMAG) != 0) return refuse("cuModuleLoadData: not a cubin");
  modules.push_back(read_cubin(static_cast<const char*>(image)));
  *module = reinterpret_cast<CUmodule>(&modules.back());
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule) {
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
  const Module& module = *reinterpret_cast<const Module*>(handle);
  const auto kernel = module.kernels.find(name);
  if (kernel == module.kernels.end()) return refuse("cuModuleGetFunction: no such kernel");
  functions.push_back({name, kernel->second});
  *function = reinterpret_cast<CUfunction>(&functions.back());
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? kMostThreads : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > kSharedOptin) return refuse("cuFuncSetAttribute: more dynamic shared memory than a block can have");
    reinterpret_cast<Function*>(function)->dynamic_shared = value;
    return CUDA_SUCCESS;
  }
  // What a driver that is older than Triton does not know.
  return refuse("cuFuncSetAttribute: unknown attribute");
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// --- launches

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  std::memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute*, void** values, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; ++i) std::memcpy(values[i], &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void**) {
  const Function& function = *reinterpret_cast<const Function*>(handle);
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (config->gridDimX == 0 || config->gridDimY == 0 || config->gridDimZ == 0) return refuse("launch: an empty grid");
  if (config->gridDimX > kMostGridX || config->gridDimY > kMostGridYZ || config->gridDimZ > kMostGridYZ) {
    return refuse("launch: a grid beyond the limits");
  }
  if (threads == 0 || threads > kMostThreads) return refuse("launch: more threads than a block can have");
  if (config->sharedMemBytes > static_cast<unsigned>(function.dynamic_shared)) {
    return refuse("launch: more shared memory than was asked for with cuFuncSetAttribute");
  }
  std::string values;
  for (std::size_t i = 0; i < function.parameters.size(); ++i) {
    values.append(static_cast<const char*>(parameters[i]), function.parameters[i]);
  }
  parameter_values.push_back(values);
  records.push_back({function.name.c_str(),
                     &function,
                     {config->gridDimX, config->gridDimY, config->gridDimZ},
                     threads,
                     config->sharedMemBytes,
                     reinterpret_cast<std::uint64_t>(config->hStream),
                     parameter_values.back().data(),
                     parameter_values.back().size()});
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  // In the order of CUtensorMapDataType, UINT8 to TFLOAT32_FTZ.
  static constexpr unsigned kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static constexpr unsigned kMostInner[] = {~0u, 32, 64, 128};  // bytes, by CUtensorMapSwizzle
  if (type >= sizeof kBytes / sizeof kBytes[0]) return refuse("tensor map: unknown data type");
  if (reinterpret_cast<std::uintptr_t>(map) % 64) return refuse("tensor map: not aligned to 64 bytes");
  if (reinterpret_cast<std::uintptr_t>(address) % kTmaAlignment) {
    return refuse("tensor map: the tensor is not aligned to 16 bytes");
  }
  if (rank < 1 || rank > 5) return refuse("tensor map: rank");
  for (unsigned i = 0; i < rank; ++i) {
    if (extents[i] == 0 || extents[i] > (1ull << 32)) return refuse("tensor map: extent");
    if (box[i] == 0 || box[i] > kMostBox) return refuse("tensor map: box");
    if (element_strides[i] != 1) return refuse("tensor map: element stride");
    if (i + 1 < rank && (strides[i] % kTmaAlignment || strides[i] >= (1ull << 40))) {
      return refuse("tensor map: stride");
    }
  }
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("tensor map: interleave");
  const unsigned inner = box[0] * kBytes[type];
  if (inner % kTmaAlignment) return refuse("tensor map: a box row is no multiple of 16 bytes");
  if (swizzle >= sizeof kMostInner / sizeof kMostInner[0] || inner > kMostInner[swizzle]) {
    return refuse("tensor map: a box row is wider than the swizzle");
  }
  // The hardware's format is not public; this one tells any two apart.
  struct Description {
    const void* address;
    cuuint64_t extents[5], strides[5];
    cuuint32_t box[5];
    std::uint16_t type, swizzle;
  } description{address, {}, {}, {}, static_cast<std::uint16_t>(type), static_cast<std::uint16_t>(swizzle)};
  static_assert(sizeof description <= sizeof *map);
  std::memcpy(description.extents, extents, rank * sizeof extents[0]);
  std::memcpy(description.strides, strides, (rank - 1) * sizeof strides[0]);
  std::memcpy(description.box, box, rank * sizeof box[0]);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &description, sizeof description);
  ++tensor_maps;
  return CUDA_SUCCESS;
}

}  // extern "C"
