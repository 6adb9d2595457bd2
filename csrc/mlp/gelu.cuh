// GELU and its derivative for one value: gelu(x) = x * Phi(x), Phi the normal distribution function, or the tanh form.
//
// For 16-bit tensors `erff` would cost more than the memory traffic, and most of its accuracy would be rounded away.
// There Phi(-a) = 2^q(a) for a >= 0 with a polynomial q of degree 8, fitted for a small *relative* error of Phi,
// smaller where fp16 can tell the difference: the negative tail, which 1 + erf(x / sqrt(2)) loses to cancellation,
// keeps its digits. 13 instructions instead of erff's 31. Checked at every finite input, with the approximate
// instructions at both ends of their error bounds (tests/test_cuda_on_host.py, BOUNDS): where |gelu| is at least 2^-14
// (fp16) or 2^-120 (bfloat16), its relative error is below 2^-15.5 or 2^-9.8, and the rounded result within one unit in
// the last place of the correctly rounded one; below that its absolute error is under 2^-29 or 2^-123. The absolute
// error of the derivative is below 2^-16.
#pragma once
#include "common/machine.cuh"

namespace convnext_kernels {

enum class Gelu { kErf, kTanh };

// fp32 results get fp32 arithmetic, 16-bit results the cheap one.
template <class T>
constexpr bool kCheapGelu = sizeof(T) == 2;

// --- exact GELU, cheap

// Phi(x). Beyond 13.2 it is 0 or 1: infinity times that propagates as in PyTorch.
__device__ __forceinline__ float normal_distribution_cheap(float x) {
  constexpr float kEnd = 13.2f;
  const float a = fminf(fabsf(x), kEnd);
  float q = 4.58650893e-08f;
  q = fmaf(q, a, -2.63719136e-06f);
  q = fmaf(q, a, 6.50966681e-05f);
  q = fmaf(q, a, -9.17161144e-04f);
  q = fmaf(q, a, 8.34889035e-03f);
  q = fmaf(q, a, -5.34589807e-02f);
  q = fmaf(q, a, -4.59119873e-01f);
  q = fmaf(q, a, -1.15093677e+00f);
  q = fmaf(q, a, -1.00002309e+00f);
  const float tail = exp2_approximate(q);
  return x > 0.0f ? 1.0f - tail : tail;
}

// The normal density, exp(-x^2 / 2) / sqrt(2 pi).
__device__ __forceinline__ float normal_density_cheap(float x) {
  constexpr float kSquare = -0.72134752f;    // -log2(e) / 2
  constexpr float kConstant = -1.32574806f;  // -log2(2 pi) / 2
  return exp2_approximate(fmaf(x * x, kSquare, kConstant));
}

// --- tanh GELU: 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which keeps the
// digits of the negative tail and is as accurate as fp32 asks for.

// exp(-2u); the gate is 1 / (1 + exp(-2u)).
__device__ __forceinline__ float tanh_gelu_exponential(float x) {
  constexpr float kLinear = -2.30220819f;  // -2 log2(e) sqrt(2 / pi)
  constexpr float kCubic = -0.10294324f;   // the same times 0.044715
  return exp2_approximate(x * fmaf(x * x, kCubic, kLinear));
}

// --- the functions the kernels use

template <class T, Gelu kGelu>
__device__ __forceinline__ Accumulation<T> gelu(Accumulation<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
    if constexpr (kGelu == Gelu::kErf) return 0.5 * x * (1.0 + erf(x * kSqrtHalf));
    return 0.5 * x * (1.0 + tanh(kSqrtTwoOverPi * (x + 0.044715 * x * x * x)));
  } else if constexpr (kGelu == Gelu::kTanh) {
    return x * reciprocal_approximate(1.0f + tanh_gelu_exponential(x));
  } else if constexpr (kCheapGelu<T>) {
    return x * normal_distribution_cheap(x);
  } else {
    constexpr float kSqrtHalf = 0.70710678f;
    return 0.5f * x * (1.0f + erff(x * kSqrtHalf));
  }
}

template <class T, Gelu kGelu>
__device__ __forceinline__ Accumulation<T> gelu_derivative(Accumulation<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    constexpr double kSqrtHalf = 0.70710678118654752440, kSqrtTwoOverPi = 0.79788456080286535588;
    if constexpr (kGelu == Gelu::kErf) {
      constexpr double kDensityAtZero = 0.39894228040143267794;
      return 0.5 * (1.0 + erf(x * kSqrtHalf)) + x * kDensityAtZero * exp(-0.5 * x * x);
    }
    const double t = tanh(kSqrtTwoOverPi * (x + 0.044715 * x * x * x));
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * kSqrtTwoOverPi * (1.0 + 3.0 * 0.044715 * x * x);
  } else if constexpr (kGelu == Gelu::kTanh) {
    constexpr float kLinear = 1.59576912f;  // 2 sqrt(2 / pi)
    constexpr float kSquare = 0.21406613f;  // the same times 3 * 0.044715
    const float exponential = tanh_gelu_exponential(x);
    const float gate = reciprocal_approximate(1.0f + exponential);
    // 1 - gate without cancellation, for x may be large. Where the exponential is infinite the gate is 0, and 0 this
    // too.
    const float closed = fminf(exponential, 1e30f) * gate;
    // In this order: at large |x| the first product is 0 before the second could overflow. (Where x * x does, beyond
    // 1.8e19, the result is NaN, as PyTorch's is.)
    return fmaf(x * gate * closed, fmaf(x * x, kSquare, kLinear), gate);
  } else if constexpr (kCheapGelu<T>) {
    return fmaf(x, normal_density_cheap(x), normal_distribution_cheap(x));
  } else {
    constexpr float kSqrtHalf = 0.70710678f, kDensityAtZero = 0.39894228f;
    const float distribution = 0.5f * (1.0f + erff(x * kSqrtHalf));
    return fmaf(x * kDensityAtZero, expf(-0.5f * x * x), distribution);
  }
}

}  // namespace convnext_kernels
