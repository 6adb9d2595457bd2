// What of a GPU the launch plans depend on. Plain C++, without CUDA's types.
#pragma once
#include <cstdint>

namespace convnext_kernels {

struct Chip {
  int multiprocessors;
  int64_t shared_bytes_per_block;  // with opt-in
  int64_t shared_bytes_per_multiprocessor;
  int threads_per_multiprocessor = 2048;
};

constexpr int kRegistersPerMultiprocessor = 65536;  // 32-bit ones, on every architecture from sm_80 to sm_120

// A chip of an architecture the kernels are compiled for: the limits are the architecture's (CUDA C++ Programming
// Guide, table of technical specifications), the multiprocessors those of its large part. No multiprocessors: an
// unknown one.
constexpr Chip chip_of_architecture(int compute_capability) {
  constexpr int64_t kKiB = 1024;
  switch (compute_capability) {
    case 80:  // A100
      return {108, 163 * kKiB, 164 * kKiB, 2048};
    case 86:  // A40
      return {84, 99 * kKiB, 100 * kKiB, 1536};
    case 89:  // L40
      return {142, 99 * kKiB, 100 * kKiB, 1536};
    case 90:  // H100, H200
      return {132, 227 * kKiB, 228 * kKiB, 2048};
    case 100:  // B200
      return {148, 227 * kKiB, 228 * kKiB, 2048};
    case 120:  // RTX PRO 6000
      return {188, 99 * kKiB, 100 * kKiB, 1536};
    default:
      return {0, 0, 0, 0};
  }
}

}  // namespace convnext_kernels
