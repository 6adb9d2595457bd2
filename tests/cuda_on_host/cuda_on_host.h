// CUDA C++ as a CPU compiler sees it: include this instead of <cuda_runtime.h>, and kernels become plain functions that
// engine.h executes. One thread of the operating system runs one block at a time; every CUDA thread is a fiber.
//
// Not emulated: wgmma, TMA, mbarriers, clusters, weak memory ordering, timing. Only a GPU proves those.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "engine.h"

// The toolkit's host_defines.h leaves these empty, or as attributes unknown to this compiler, outside nvcc.
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static  // one block at a time on one thread: exact
#define __launch_bounds__(...)
#define __grid_constant__

// Where a barrier or a warp operation was called: a default argument, so that it names the line of the call.
#define EMU_SITE ::emu::Site site = {__builtin_FILE(), __builtin_LINE()}
// For functions that touch memory in the name of the GPU and report it themselves.
#define EMU_UNINSTRUMENTED __attribute__((noinline, no_sanitize("thread")))

// Plain globals, rewritten at every switch between fibers.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};
static constexpr int warpSize = 32;

// --- launch

namespace emu {
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_const_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  run(
      op, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
      [](void* context) {
        auto* call = static_cast<Call*>(context);
        std::apply(call->kernel, call->arguments);
      },
      &call);
}

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kSlotBytes, "cannot shuffle this type");
  LaneSlot& slot = lane_slot();
  std::memcpy(slot.value, &value, sizeof(value));
  slot.number = source;
  warp_operation(
      mask,
      [](LaneSlot* const* lane, unsigned lanes, const void*) {
        for (int i = 0; i < 32; ++i) {
          if (!(lanes >> i & 1) || !lane[i]) continue;
          const int from = lane[i]->number;
          if (!(lanes >> from & 1) || !lane[from])
            fail("shuffle reads lane " + std::to_string(from) + ", which is not in the mask or has exited");
          std::memcpy(lane[i]->result, lane[from]->value, kSlotBytes);
        }
      },
      nullptr, site);
  T result;
  std::memcpy(&result, slot.result, sizeof(result));
  return result;
}
}  // namespace emu

// --- barriers

inline void __syncthreads(EMU_SITE) {
  emu::block_barrier(site);
}
inline int __syncthreads_count(int value, EMU_SITE) {
  return emu::block_barrier(value, emu::Vote::kCount, site);
}
inline int __syncthreads_and(int value, EMU_SITE) {
  return emu::block_barrier(value, emu::Vote::kAll, site);
}
inline int __syncthreads_or(int value, EMU_SITE) {
  return emu::block_barrier(value, emu::Vote::kAny, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) {
  emu::warp_operation(mask, [](emu::LaneSlot* const*, unsigned, const void*) {}, nullptr, site, true);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- warp operations

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
  const int lane = emu::lane_id();
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMU_SITE) {
  const int lane = emu::lane_id(), source = lane ^ bits;
  return emu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int lane = emu::lane_id(), source = lane + static_cast<int>(delta);
  return emu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int lane = emu::lane_id(), source = lane - static_cast<int>(delta);
  return emu::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
  emu::LaneSlot& slot = emu::lane_slot();
  slot.number = predicate != 0;
  emu::warp_operation(
      mask,
      [](emu::LaneSlot* const* lane, unsigned, const void*) {
        unsigned ballot = 0;
        for (int i = 0; i < 32; ++i)
          if (lane[i] && lane[i]->number) ballot |= 1u << i;
        for (int i = 0; i < 32; ++i)
          if (lane[i]) std::memcpy(lane[i]->result, &ballot, sizeof(ballot));
      },
      nullptr, site);
  unsigned result;
  std::memcpy(&result, slot.result, sizeof(result));
  return result;
}
inline int __any_sync(unsigned mask, int predicate, EMU_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMU_SITE) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

// --- atomics: a plain read and write, as fibers are not interrupted; the race hooks know them for atomic

namespace emu {
template <class T, class Change>
EMU_UNINSTRUMENTED T atomic(T* at, const void* caller, Change change) {
  note_atomic(at, sizeof(T), caller);
  const T old = *at;
  *at = change(old);
  return old;
}
}  // namespace emu

template <class T>
EMU_UNINSTRUMENTED T atomicAdd(T* at, T value) {
  return emu::atomic(at, __builtin_return_address(0), [&](T old) { return old + value; });
}
template <class T>
EMU_UNINSTRUMENTED T atomicMax(T* at, T value) {
  return emu::atomic(at, __builtin_return_address(0), [&](T old) { return old < value ? value : old; });
}
template <class T>
EMU_UNINSTRUMENTED T atomicExch(T* at, T value) {
  return emu::atomic(at, __builtin_return_address(0), [&](T) { return value; });
}
template <class T>
EMU_UNINSTRUMENTED T atomicCAS(T* at, T expected, T value) {
  return emu::atomic(at, __builtin_return_address(0), [&](T old) { return old == expected ? value : old; });
}

// --- loads, arithmetic, bits. These are exact; machine.cuh wraps those that are approximate on the GPU.

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
inline float rsqrtf(float x) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
using std::max;
using std::min;

// --- tensor cores, from the layouts in the PTX manual

namespace emu {

// What lane i gets of kCount matrices with these rows: elements 2 * (i % 4) and the next one of row i / 4.
template <bool kTransposed, int kCount>
void fragments_of(char* fragments, const char* const (&rows)[kCount * 8], int i) {
  for (int matrix = 0; matrix < kCount; ++matrix) {
    const int line = i / 4, pair = i % 4 * 2;
    for (int j = 0; j < 2; ++j) {
      const int row = kTransposed ? pair + j : line, column = kTransposed ? line : pair + j;
      std::memcpy(fragments + matrix * 4 + j * 2, rows[matrix * 8 + row] + column * 2, 2);
    }
  }
}

template <bool kTransposed, int kCount>
void load_matrices(uint32_t (&fragments)[kCount], const void* row, Site site) {
  LaneSlot& slot = lane_slot();
  if (lane_id() < kCount * 8) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row is not 16-byte aligned");
    const uint4 bits = *static_cast<const uint4*>(row);  // an ordinary load, which sanitizers and race hooks see
    std::memcpy(slot.value, &bits, sizeof(bits));
  }
  warp_operation(
      0xffffffffu,
      [](LaneSlot* const* lane, unsigned, const void*) {
        for (int i = 0; i < 32; ++i)
          if (!lane[i]) fail("ldmatrix: a lane has exited");
        const char* rows[kCount * 8];
        for (int i = 0; i < kCount * 8; ++i) rows[i] = reinterpret_cast<const char*>(lane[i]->value);
        for (int i = 0; i < 32; ++i)
          fragments_of<kTransposed, kCount>(reinterpret_cast<char*>(lane[i]->result), rows, i);
      },
      nullptr, site);
  std::memcpy(fragments, slot.result, sizeof(fragments));
}

inline uint32_t transpose_matrix(uint32_t fragment, Site site) {
  LaneSlot& slot = lane_slot();
  std::memcpy(slot.value, &fragment, sizeof(fragment));
  warp_operation(
      0xffffffffu,
      [](LaneSlot* const* lane, unsigned, const void*) {
        char matrix[8][16];
        for (int i = 0; i < 32; ++i) {
          if (!lane[i]) fail("movmatrix: a lane has exited");
          std::memcpy(matrix[i / 4] + i % 4 * 4, lane[i]->value, 4);
        }
        const char* rows[8];
        for (int i = 0; i < 8; ++i) rows[i] = matrix[i];
        for (int i = 0; i < 32; ++i) fragments_of<true, 1>(reinterpret_cast<char*>(lane[i]->result), rows, i);
      },
      nullptr, site);
  uint32_t result;
  std::memcpy(&result, slot.result, sizeof(result));
  return result;
}

template <class T>
void multiply_add(float (&accumulator)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  struct Fragments {
    float accumulator[4];
    T a[8], b[4];
  };
  static_assert(sizeof(Fragments) <= kSlotBytes);
  Fragments mine;
  std::memcpy(mine.accumulator, accumulator, sizeof(accumulator));
  std::memcpy(static_cast<void*>(mine.a), a, sizeof(a));
  std::memcpy(static_cast<void*>(mine.b), b, sizeof(b));
  LaneSlot& slot = lane_slot();
  std::memcpy(slot.value, &mine, sizeof(mine));
  warp_operation(
      0xffffffffu,
      [](LaneSlot* const* lane, unsigned, const void*) {
        float left[16][16], right[16][8];
        Fragments of[32];
        for (int i = 0; i < 32; ++i) {
          if (!lane[i]) fail("mma: a lane has exited");
          std::memcpy(static_cast<void*>(&of[i]), lane[i]->value, sizeof(Fragments));
          const int group = i / 4, pair = i % 4 * 2;
          for (int j = 0; j < 8; ++j)
            left[group + (j / 2 % 2 ? 8 : 0)][pair + j % 2 + (j >= 4 ? 8 : 0)] = static_cast<float>(of[i].a[j]);
          for (int j = 0; j < 4; ++j) right[pair + j % 2 + (j >= 2 ? 8 : 0)][group] = static_cast<float>(of[i].b[j]);
        }
        for (int i = 0; i < 32; ++i) {
          for (int j = 0; j < 4; ++j) {
            const int row = i / 4 + (j >= 2 ? 8 : 0), column = i % 4 * 2 + j % 2;
            double sum = of[i].accumulator[j];
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
            of[i].accumulator[j] = static_cast<float>(sum);
          }
          std::memcpy(lane[i]->result, of[i].accumulator, sizeof(of[i].accumulator));
        }
      },
      nullptr, site);
  std::memcpy(accumulator, slot.result, sizeof(accumulator));
}

}  // namespace emu
