// Neighbouring elements of a type that may differ from the one the row pass is planned for.
#pragma once
#include "mlp/row_walk.cuh"

namespace convnext_kernels {

// In place of an element type: known at run time only. The mixtures of types that training and inference use have
// kernels of their own; the others go element by element.
struct AnyElement {};

// kSize neighbouring elements as they lie in memory, in pieces of 16 bytes where there are as many.
template <class R, class A, int kSize>
struct Pieces {
  static constexpr int kPiece = kSize * sizeof(R) > kVectorBytes ? kVectorBytes / sizeof(R) : kSize;
  static constexpr int kPieces = kSize / kPiece;
  Vector<R, kPiece> piece[kPieces];

  // Zeros where not `valid`: then nothing is read.
  __device__ __forceinline__ void load(Parameter from, int64_t offset, bool valid) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
      piece[p] = load_live<R, kPiece>(static_cast<const R*>(from.data) + offset + p * kPiece, valid);
  }
  __device__ __forceinline__ A operator[](int i) const {
    return to_accumulation(piece[i / kPiece].element[i % kPiece]);
  }
  static __device__ __forceinline__ void store_rounded(void* to, ElementType, int64_t offset,
                                                       const A (&values)[kSize]) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      A part[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) part[i] = values[p * kPiece + i];
      store(static_cast<R*>(to) + offset + p * kPiece, pack<R>(part));
    }
  }
};

template <class A, int kSize>
struct Pieces<AnyElement, A, kSize> {
  A value[kSize];

  __device__ __forceinline__ void load(Parameter from, int64_t offset, bool valid) {
    load_parameter(value, valid ? from : Parameter{}, offset);
  }
  __device__ __forceinline__ A operator[](int i) const { return value[i]; }
  static __device__ __forceinline__ void store_rounded(void* to, ElementType type, int64_t offset,
                                                       const A (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (std::is_same_v<A, double>) {
        static_cast<double*>(to)[offset + i] = values[i];
      } else if (type == ElementType::kHalf) {
        static_cast<__half*>(to)[offset + i] = from_accumulation<__half>(values[i]);
      } else if (type == ElementType::kBFloat16) {
        static_cast<__nv_bfloat16*>(to)[offset + i] = from_accumulation<__nv_bfloat16>(values[i]);
      } else {
        static_cast<float*>(to)[offset + i] = values[i];
      }
    }
  }
};

}  // namespace convnext_kernels
