// Which build of the CPU kernels runs on this processor. Each cpu_kernels.cpp is compiled once per capability.
#pragma once
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace convnext_kernels {

enum class CpuCapability { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kCpuCapabilities = 4;

inline const char* name_of(CpuCapability capability) {
  constexpr const char* kNames[kCpuCapabilities] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(capability)];
}

inline CpuCapability supported_cpu_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? CpuCapability::kAvx512Bf16 : CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kPortable;
}

// The best one this processor has, or the one that CONVNEXT_KERNELS_CPU_CAPABILITY names (portable, avx2, avx512,
// avx512_bf16).
inline CpuCapability cpu_capability() {
  static const CpuCapability chosen = [] {
    const CpuCapability best = supported_cpu_capability();
    const char* wanted = std::getenv("CONVNEXT_KERNELS_CPU_CAPABILITY");
    if (!wanted || !*wanted) return best;
    for (int i = 0; i < kCpuCapabilities; ++i) {
      const auto capability = static_cast<CpuCapability>(i);
      if (std::strcmp(wanted, name_of(capability)) != 0) continue;
      if (i > static_cast<int>(best))
        throw std::runtime_error(std::string("CONVNEXT_KERNELS_CPU_CAPABILITY: this processor does not support '") +
                                 wanted + "', only up to '" + name_of(best) + "'");
      return capability;
    }
    throw std::runtime_error(
        std::string("CONVNEXT_KERNELS_CPU_CAPABILITY: expected portable, avx2, avx512 or avx512_bf16, got '") + wanted +
        "'");
  }();
  return chosen;
}

// The processor's of the tables of kernels, which stand in the capabilities' order.
template <class Table>
const Table& of_this_processor(std::initializer_list<const Table*> tables) {
  return *tables.begin()[static_cast<int>(cpu_capability())];
}

}  // namespace convnext_kernels
