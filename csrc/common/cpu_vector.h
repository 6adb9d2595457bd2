// Vectors of the accumulation type (float or double), as wide as the capability this file is compiled for, with
// loads and stores that convert from and to the element types in memory.
//
// Included only by cpu_kernels.cpp files, which are compiled once per capability with different instruction sets.
// Everything is in a namespace named after the capability, and nothing here pulls in an inline function of another
// header: the linker keeps one copy of such a function, and it could be the one with instructions the processor lacks.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef CPU_CAPABILITY
#error "compile with -DCPU_CAPABILITY=portable, avx2, avx512 or avx512_bf16"
#endif

namespace convnext_kernels::CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// 16-bit elements as they lie in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <class T>
using Accumulation = typename AccumulationOf<T>::type;

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t halves __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VectorOf<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = VectorOf<A>::kLanes;

#define CK_INLINE static inline __attribute__((always_inline))

template <class To, class From>
CK_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
CK_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// --- scalar conversions (tails, and the portable build's fp16)
CK_INLINE float to_float(bfloat16 value) {
  return bit_copy<float>(static_cast<uint32_t>(value.bits) << 16);
}
CK_INLINE float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_copy<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x400u) {  // subnormal: exact in fp32
    const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return bit_copy<float>(bit_copy<uint32_t>(magnitude) | sign);
  }
  return bit_copy<float>(sign | ((rest << 13) + 0x38000000u));
}
CK_INLINE float to_float(float value) {
  return value;
}
CK_INLINE double to_float(double value) {
  return value;
}

template <class T>
CK_INLINE T from_float(Accumulation<T> value) {
  if constexpr (sizeof(T) == sizeof(Accumulation<T>)) {
    return value;
  } else if constexpr (__is_same(T, bfloat16)) {
    if (value != value) return {0x7fc0};
    const uint32_t bits = bit_copy<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    const uint32_t bits = bit_copy<uint32_t>(value), sign = (bits >> 16) & 0x8000u;
    uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
    if (rest < 0x38800000u) {                                                 // subnormal: adding 0.5 rounds at 2^-24
      const float shifted = bit_copy<float>(rest) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000u))};
    }
    rest += 0xfffu + ((rest >> 13) & 1u) - 0x38000000u;
    return {static_cast<uint16_t>(sign | (rest >> 13))};
  }
}

// --- vector loads and stores
template <class T>
CK_INLINE Vector<Accumulation<T>> load(const T* from) {
  using A = Accumulation<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    Vector<A> out;
    std::memcpy(&out, from, sizeof(out));
    return out;
  } else if constexpr (__is_same(T, bfloat16)) {
#if defined(__AVX512F__)  // gcc splits the conversion below in two
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bit_copy<Vector<float>>(bit_copy<VectorOf<float>::bits>(_mm512_cvtepu16_epi32(raw)) << 16);
#else
    typename VectorOf<float>::halves raw;
    std::memcpy(&raw, from, sizeof(raw));
    return bit_copy<Vector<float>>(__builtin_convertvector(raw, VectorOf<float>::bits) << 16);
#endif
  } else {
#if defined(__AVX512F__)
    return bit_copy<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return bit_copy<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vector<float> out;
    for (int i = 0; i < kLanes<float>; ++i) out[i] = to_float(from[i]);
    return out;
#endif
  }
}

template <class T>
CK_INLINE void store(T* to, Vector<Accumulation<T>> value) {
  if constexpr (sizeof(T) == sizeof(Accumulation<T>)) {
    std::memcpy(to, &value, sizeof(value));
#if defined(__AVX512BF16__)
  } else if constexpr (__is_same(T, bfloat16)) {  // to the nearest as below, but subnormal numbers become 0
    const __m256bh halves = _mm512_cvtneps_pbh(bit_copy<__m512>(value));
    std::memcpy(to, &halves, sizeof(halves));
#endif
  } else if constexpr (__is_same(T, bfloat16)) {
    using Bits = VectorOf<float>::bits;
    const Bits bits = bit_copy<Bits>(value);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits result = value != value ? Bits{} + 0x7fc0u : rounded;
    const auto halves = __builtin_convertvector(result, VectorOf<float>::halves);
    std::memcpy(to, &halves, sizeof(halves));
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(bit_copy<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(bit_copy<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes<float>; ++i) to[i] = from_float<T>(value[i]);
#endif
  }
}

// The first `count` lanes only; the others read as zero. For tails. With AVX-512 by masks: elsewhere a memcpy of a size
// that is not known here is a call.
template <class T>
CK_INLINE Vector<Accumulation<T>> load_partial(const T* from, int count) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 8)
    return bit_copy<Vector<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
  if constexpr (sizeof(T) == 4) return bit_copy<Vector<float>>(_mm512_maskz_loadu_ps(mask, from));
  if constexpr (sizeof(T) == 2) {
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, from);
    T padded[kLanes<float>];
    std::memcpy(padded, &raw, sizeof(raw));
    return load(padded);
  }
#else
  T padded[kLanes<Accumulation<T>>] = {};
  std::memcpy(padded, from, sizeof(T) * static_cast<size_t>(count));
  return load(padded);
#endif
}
template <class T>
CK_INLINE void store_partial(T* to, Vector<Accumulation<T>> value, int count) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), bit_copy<__m512d>(value));
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, mask, bit_copy<__m512>(value));
  if constexpr (sizeof(T) == 2) {
    T padded[kLanes<float>];
    store(padded, value);
    _mm256_mask_storeu_epi16(to, mask, bit_copy<__m256i>(padded));
  }
#else
  T padded[kLanes<Accumulation<T>>];
  store(padded, value);
  std::memcpy(to, padded, sizeof(T) * static_cast<size_t>(count));
#endif
}

template <class A>
CK_INLINE A horizontal_sum(Vector<A> value) {
  // Pairwise, in one order whatever the width.
  A lanes[kLanes<A>];
  std::memcpy(lanes, &value, sizeof(value));
  for (int step = kLanes<A> / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

}  // namespace convnext_kernels::CPU_CAPABILITY
