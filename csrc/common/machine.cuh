// Where kernels meet the machine: the only file with PTX, and the only one that knows that kernels are compiled twice.
//
// nvcc compiles them for the GPU. A C++ compiler compiles the very same text for the CPU, where the engine in
// tests/cuda_on_host/ executes it: each function below has the same meaning there, written in plain C++.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_on_host.h"
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace convnext_kernels {

// --- element types ------------------------------------------------------------------------------------------------

template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
// The type that elements of type T are computed in.
template <class T>
using Accumulation = typename AccumulationOf<T>::type;

__device__ __forceinline__ float to_accumulation(float value) {
  return value;
}
__device__ __forceinline__ double to_accumulation(double value) {
  return value;
}
__device__ __forceinline__ float to_accumulation(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float to_accumulation(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_accumulation(Accumulation<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// --- vectors in memory --------------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;  // the widest access of one thread on every architecture before sm_100

// kSize neighbouring elements. Those of 16 and of 8 bytes are read and written by one instruction.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T element[kSize];
};

// Reads what no other thread will read again: it should not push anything else out of the caches.
template <class T, int kSize>
__device__ __forceinline__ Vector<T, kSize> load_streaming(const T* from) {
  Vector<T, kSize> vector;
  if constexpr (sizeof(vector) == kVectorBytes) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    std::memcpy(&vector, &bits, sizeof(bits));
  } else if constexpr (sizeof(vector) == kVectorBytes / 2) {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(from));
    std::memcpy(&vector, &bits, sizeof(bits));
  } else {
    static_assert(kSize == 1, "a vector has one element, 8 bytes or 16");
    vector.element[0] = *from;
  }
  return vector;
}

// The same where `valid`; else zeros, and nothing is read. The choice is made between whole registers.
template <class T, int kSize>
__device__ __forceinline__ Vector<T, kSize> load_streaming(const T* from, bool valid) {
  Vector<T, kSize> vector;
  if constexpr (sizeof(vector) == kVectorBytes) {
    uint4 bits{0, 0, 0, 0};
    if (valid) bits = __ldcs(reinterpret_cast<const uint4*>(from));
    std::memcpy(&vector, &bits, sizeof(bits));
  } else if constexpr (sizeof(vector) == kVectorBytes / 2) {
    uint2 bits{0, 0};
    if (valid) bits = __ldcs(reinterpret_cast<const uint2*>(from));
    std::memcpy(&vector, &bits, sizeof(bits));
  } else {
    vector = valid ? load_streaming<T, kSize>(from) : Vector<T, kSize>{};
  }
  return vector;
}

// To global memory. PTX, as the compiler splits some plain assignments of 16 bytes into four of 4.
template <class T, int kSize>
__device__ __forceinline__ void store(T* to, const Vector<T, kSize>& vector) {
  if constexpr (sizeof(vector) == kVectorBytes) {
    uint4 bits;
    std::memcpy(&bits, &vector, sizeof(bits));
#if defined(__CUDACC__)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = bits;
#endif
  } else if constexpr (sizeof(vector) == kVectorBytes / 2) {
    uint2 bits;
    std::memcpy(&bits, &vector, sizeof(bits));
#if defined(__CUDACC__)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y) : "memory");
#else
    *reinterpret_cast<uint2*>(to) = bits;
#endif
  } else {
    static_assert(kSize == 1, "a vector has one element, 8 bytes or 16");
    *to = vector.element[0];
  }
}

template <class T, int kSize>
__device__ __forceinline__ void unpack(Accumulation<T> (&values)[kSize], const Vector<T, kSize>& vector) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kSize % 2 == 0) {
    // One instruction an element, of a pair in a register; the compiler's own way takes two.
    uint32_t pairs[kSize / 2];
    std::memcpy(pairs, &vector, sizeof(vector));
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      values[i] = __uint_as_float(pairs[i / 2] << 16);
      values[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_accumulation(vector.element[i]);
  }
}

template <class T, int kSize>
__device__ __forceinline__ Vector<T, kSize> pack(const Accumulation<T> (&values)[kSize]) {
  Vector<T, kSize> vector;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    // One instruction converts a pair.
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(values[i], values[i + 1]);
        vector.element[i] = pair.x;
        vector.element[i + 1] = pair.y;
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
        vector.element[i] = pair.x;
        vector.element[i + 1] = pair.y;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) vector.element[i] = from_accumulation<T>(values[i]);
  }
  return vector;
}

// --- parameters: small tensors of any element type, read a few times, so that no cast copy is needed ----------------

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

struct Parameter {
  const void* data = nullptr;  // null: the parameter is absent
  ElementType type = ElementType::kFloat;
};

// Elements first .. first + kSize - 1 in the accumulation type A; zeros where the parameter is absent.
template <class A, int kSize>
__device__ __forceinline__ void load_parameter(A (&values)[kSize], Parameter parameter, int64_t first) {
  const auto load = [&](auto* data) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = static_cast<A>(to_accumulation(data[first + i]));
  };
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = A(0);
  if (!parameter.data) return;
  switch (parameter.type) {
    case ElementType::kFloat:
      return load(static_cast<const float*>(parameter.data));
    case ElementType::kDouble:
      return load(static_cast<const double*>(parameter.data));
    case ElementType::kHalf:
      return load(static_cast<const __half*>(parameter.data));
    case ElementType::kBFloat16:
      return load(static_cast<const __nv_bfloat16*>(parameter.data));
  }
}

// --- fast arithmetic ----------------------------------------------------------------------------------------------
// The host computes these exactly and then adds the error the PTX manual allows, in the direction that the test asks
// for: what is proved there about a formula holds on the GPU.

// 2^x, within 2 units in the last place of the correctly rounded result (PTX ISA 9.1, section 9.7.3.21); results below
// 2^-126 become 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = emu::approximate(std::exp2(static_cast<double>(x)), 2.5 * 0x1p-23);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

// 1 / x for x >= 0, within 1 unit in the last place (PTX ISA 9.1, section 9.7.3.13), taken as of the correctly rounded
// result; results below 2^-126 become 0.
__device__ __forceinline__ float reciprocal_approximate(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = emu::approximate(1.0 / static_cast<double>(x), 1.5 * 0x1p-23);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

// --- warps --------------------------------------------------------------------------------------------------------

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over groups of kLanes neighbouring lanes, in each of them, in an order that does not depend on the lane.
template <int kLanes = kWarpSize, class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// --- shared memory ------------------------------------------------------------------------------------------------

// Dynamic shared memory in pieces of 128 bytes: what a piece of `bytes` takes of it.
__host__ __device__ constexpr size_t shared_piece(size_t bytes) {
  return (bytes + 127) / 128 * 128;
}

// Carves dynamic shared memory into pieces. All threads of a block take the same pieces in the same order. On the host
// each is a block of its own with guarded ends.
class SharedMemory {
 public:
#if defined(__CUDACC__)
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(1024) unsigned char all_shared_memory[];
    next_ = all_shared_memory;
  }
  template <class T>
  __device__ __forceinline__ T* take(size_t count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += shared_piece(count * sizeof(T));
    return piece;
  }

 private:
  unsigned char* next_;
#else
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(emu::shared_piece(ordinal_++, count * sizeof(T)));
  }

 private:
  int ordinal_ = 0;
#endif
};

// Starts copying 16 bytes from global to shared memory; where not `valid`, writes zeros and reads nothing.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#if defined(__CUDACC__)
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  emu::copy_async(shared, global, 16, valid ? 16 : 0, {__FILE__, __LINE__});
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::copy_async_commit();
#endif
}

// Waits until at most kPending of this thread's groups are still under way. Other threads' copies need a barrier too.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emu::copy_async_wait(kPending);
#endif
}

// --- tensor cores -------------------------------------------------------------------------------------------------

// kCount (2 or 4) 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row l % 8 of matrix
// l / 8, and gets of each matrix the elements 2 * (l % 4) and the next one of row l / 4; where kTransposed, of column
// l / 4. Of two matrices lanes 16 to 31 give no address.
template <bool kTransposed = false, int kCount>
__device__ __forceinline__ void load_matrices(uint32_t (&fragments)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4, "two or four matrices");
#if defined(__CUDACC__)
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragments[0]), "=r"(fragments[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragments[0]), "=r"(fragments[1])
                 : "r"(from)
                 : "memory");
  }
#else
  emu::load_matrices<kTransposed>(fragments, row, {__FILE__, __LINE__});
#endif
}

// An 8 x 8 matrix of 16-bit elements, in registers as load_matrices leaves it, transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t fragment) {
#if defined(__CUDACC__)
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
#else
  return emu::transpose_matrix(fragment, {__FILE__, __LINE__});
#endif
}

// The lower halves of two pairs of 16-bit elements, as a pair, and the upper ones.
__device__ __forceinline__ uint32_t lower_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ uint32_t upper_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// accumulator (16 x 8, fp32) += a (16 x 16) b (16 x 8) for T = bfloat16 or half, in the fragment layout of
// mma.m16n8k16.
template <class T>
__device__ __forceinline__ void multiply_add(float (&accumulator)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2, "tensor cores multiply 16-bit elements");
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  emu::multiply_add<T>(accumulator, a, b, {__FILE__, __LINE__});
#endif
}

// --- launches -----------------------------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Runs `kernel` on the stream, in the name of operator `op`. Raises RuntimeError in Python where CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape, Arguments&&... arguments) {
#if defined(__CUDACC__)
  constexpr size_t kAlwaysAllowed = 48 * 1024;  // more dynamic shared memory has to be asked for
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kAlwaysAllowed) {
    // All there is, whatever this launch takes of it: the limit is the kernel's, and another thread that lowered it to
    // what its own launch takes would make this one fail.
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = shape.stream;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here; it must not be found again by the next one who looks
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  throw std::runtime_error(std::string("convnext_kernels::") + op + ": CUDA error '" + cudaGetErrorString(error) +
                           "' (" + cudaGetErrorName(error) + ") launching a grid of " + text(shape.grid) +
                           " blocks of " + text(shape.block) + " threads with " + std::to_string(shape.shared_bytes) +
                           " bytes of shared memory");
#else
  emu::launch(op, kernel, shape.grid, shape.block, shape.shared_bytes, std::forward<Arguments>(arguments)...);
#endif
}

// --- hints --------------------------------------------------------------------------------------------------------

// Brings the line of global memory into the L2 cache; the host only looks whether the address exists.
__device__ __forceinline__ void prefetch_to_l2(const void* global) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  static_cast<void>(*static_cast<const volatile char*>(global));
#endif
}

// For a kernel without registers to spare: what was computed from the vector before is not kept for after.
template <class T, int kSize>
__device__ __forceinline__ void forget(Vector<T, kSize>& vector) {
#if defined(__CUDACC__)
  if constexpr (sizeof(vector) % sizeof(uint32_t) == 0) {
    uint32_t bits[sizeof(vector) / sizeof(uint32_t)];
    std::memcpy(bits, &vector, sizeof(bits));
#pragma unroll
    for (uint32_t& part : bits) asm volatile("" : "+r"(part));
    std::memcpy(&vector, bits, sizeof(bits));
  }
#else
  (void)vector;
#endif
}

// threadIdx.x for a kernel without registers to spare: what is computed from it inside a loop is not kept from outside.
__device__ __forceinline__ int reread_thread_index() {
#if defined(__CUDACC__)
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

}  // namespace convnext_kernels
