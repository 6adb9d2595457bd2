// GELU's functions on vectors. float: own fits, within a few ulp; double: lane by lane with the C library's.
//
// The coefficients were fitted in fp64 for the least largest relative error over the interval given with each, by
// iteratively reweighted least squares (Lawson) on Chebyshev nodes, and rounded to float.
#pragma once
#include "common/cpu_vector.h"

namespace convnext_kernels::CPU_CAPABILITY {

CK_INLINE Vector<float> absolute(Vector<float> x) {
  return bit_copy<Vector<float>>(bit_copy<VectorOf<float>::bits>(x) & 0x7fffffffu);
}

// exp(x) for x <= 0 or NaN; 0 below -86.5, where the true value is less than 3e-38.
CK_INLINE Vector<float> exp_of_negative(Vector<float> x) {
  // Adding 1.5 * 2^23 rounds x / ln 2 to an integer n, in the low bits; 127 more and they are the exponent of 2^n.
  constexpr float kMagic = 12582912.0f + 127.0f;
  const Vector<float> shifted = x * 1.44269504f + kMagic;
  const Vector<float> n = shifted - kMagic;
  const Vector<float> power = bit_copy<Vector<float>>(bit_copy<VectorOf<float>::bits>(shifted) << 23);
  // ln 2 in two parts: the first is cut off at 16 bits, so that its product with n is exact.
  const Vector<float> r = (x - n * 0.693145751953125f) - n * 1.42860682e-6f;
  // |r| <= ln 2 / 2: relative error 2e-9
  Vector<float> p = broadcast(1.38367934e-3f);
  p = p * r + 8.37485678e-3f;
  p = p * r + 4.16682288e-2f;
  p = p * r + 1.66664198e-1f;
  p = p * r + 4.99999911e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x < -86.5f ? Vector<float>{} : p * power;
}

// gelu(x) = x * gate(x), gelu'(x) = gate(x) + x * slope(x); slope is the derivative of gate.
template <class A>
struct Gate {
  Vector<A> gate, slope;
};

// gate: the normal distribution function (kTanh: its tanh approximation, the logistic function of
// v(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3)). Both come from the tail at -|x|, which keeps its relative accuracy.
template <bool kTanh>
CK_INLINE Gate<float> gelu_gate(Vector<float> x) {
  const Vector<float> square = x * x;
  Vector<float> tail, slope;
  if constexpr (kTanh) {
    constexpr float kScale = 1.59576912f, kCubic = 0.044715f;
    // The bound keeps 0 * infinity from the slope of large finite x.
    const Vector<float> bounded = square > 1e6f ? broadcast(1e6f) : square;
    const Vector<float> e = exp_of_negative(absolute(x) * (bounded * (-kScale * kCubic) - kScale));
    tail = e / (e + 1.0f);
    slope = (tail - tail * tail) * (bounded * (3.0f * kScale * kCubic) + kScale);
  } else {
    // exp(x^2 / 2) * tail is q P(q) with q = 1 / (1 + 0.35 |x|), |x| <= 13.5: relative error 4e-8
    const Vector<float> e = exp_of_negative(square * -0.5f);
    const Vector<float> q = 1.0f / (absolute(x) * 0.35f + 1.0f);
    Vector<float> p = broadcast(-2.91258693e-2f);
    p = p * q + 1.43872246e-1f;
    p = p * q - 2.55504608e-1f;
    p = p * q + 1.58929333e-1f;
    p = p * q - 2.29371656e-2f;
    p = p * q + 1.05432950e-1f;
    p = p * q + 1.19852431e-1f;
    p = p * q + 1.39859080e-1f;
    p = p * q + 1.39621571e-1f;
    tail = p * q * e;
    slope = e * 0.398942280f;
  }
  return {x > 0.0f ? 1.0f - tail : tail, slope};
}

template <bool kTanh>
CK_INLINE Gate<double> gelu_gate(Vector<double> x) {
  Gate<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    const double value = x[i], square = value * value;
    if constexpr (kTanh) {
      constexpr double kScale = 1.5957691216057307118, kCubic = 0.044715;
      const double bounded = square > 1e6 ? 1e6 : square;
      const double gate = 1 / (1 + __builtin_exp(-value * (kScale + kScale * kCubic * bounded)));
      result.gate[i] = gate;
      result.slope[i] = gate * (1 - gate) * (kScale + 3 * kScale * kCubic * bounded);
    } else {
      result.gate[i] = 0.5 * __builtin_erfc(value * -0.70710678118654752440);
      result.slope[i] = 0.39894228040143267794 * __builtin_exp(-0.5 * square);
    }
  }
  return result;
}

}  // namespace convnext_kernels::CPU_CAPABILITY
