// GELU's functions on vectors. float: own fits, within a few ulp; where memory holds 16 bits, shorter ones, within a
// fraction of their rounding; double: lane by lane with the C library's.
//
// The coefficients were fitted in fp64 for the least largest relative error over the interval given with each, by
// iteratively reweighted least squares (Lawson) on Chebyshev nodes, and rounded to float.
#pragma once
#include "common/cpu_vector.h"

namespace convnext_kernels::CPU_CAPABILITY {

CK_INLINE Vector<float> absolute(Vector<float> x) {
  return bit_copy<Vector<float>>(bit_copy<VectorOf<float>::bits>(x) & 0x7fffffffu);
}

// By Horner's rule, the highest coefficient first.
template <int kCount>
CK_INLINE Vector<float> polynomial(const float (&coefficients)[kCount], Vector<float> x) {
  Vector<float> p = broadcast(coefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < kCount; ++i) p = p * x + coefficients[i];
  return p;
}

// 1 / x, relative error at most 2^-14.
CK_INLINE Vector<float> rough_reciprocal(Vector<float> x) {
#if defined(__AVX512F__)
  return bit_copy<Vector<float>>(_mm512_rcp14_ps(bit_copy<__m512>(x)));
#else
  return 1.0f / x;
#endif
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
  constexpr float kExp[] = {1.38367934e-3f, 8.37485678e-3f, 4.16682288e-2f, 1.66664198e-1f, 4.99999911e-1f, 1.0f, 1.0f};
  return x < -86.5f ? Vector<float>{} : polynomial(kExp, r) * power;
}

// The same with a polynomial for 2^r, |r| <= 1 / 2: its error, and what rounding x / ln 2 adds (5e-6 at most).
template <int kCount>
CK_INLINE Vector<float> rough_exp_of_negative(const float (&exp2)[kCount], Vector<float> x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  const Vector<float> exponent = x * 1.44269504f;
  const Vector<float> shifted = exponent + kMagic;
  const Vector<float> power = bit_copy<Vector<float>>(bit_copy<VectorOf<float>::bits>(shifted) << 23);
  return x < -86.5f ? Vector<float>{} : polynomial(exp2, exponent - (shifted - kMagic)) * power;
}

// gelu(x) = x * gate(x), gelu'(x) = gate(x) + x * slope(x); slope is the derivative of gate.
template <class A>
struct Gate {
  Vector<A> gate, slope;
};

// What gate is made of: exp(x) for x <= 0 or NaN, 1 / x, and P(q), q = 1 / (1 + kSlope |x|), |x| <= 13.5, with which
// exp(-x^2 / 2) q P(q) is the normal distribution function of -|x|.
template <class T>
struct GateParts;

// Where memory holds 16 bits, the tail's relative error is the reciprocal's 2^-14, the exponential's and P's.
template <>
struct GateParts<float16> {  // together at most 2^-13
  static constexpr float kSlope = 0.31f;
  static constexpr float kTail[] = {-7.39291459e-2f, 1.80450365e-1f, 1.57446917e-2f,  // 5e-6
                                    1.33429796e-1f,  1.20441273e-1f, 1.23860702e-1f};
  static constexpr float kExp2[] = {9.57010221e-3f, 5.59178591e-2f, 2.40247443e-1f,  // 3e-6
                                    6.93121791e-1f, 9.99999285e-1f};
  CK_INLINE Vector<float> exp(Vector<float> x) { return rough_exp_of_negative(kExp2, x); }
  CK_INLINE Vector<float> reciprocal(Vector<float> x) { return rough_reciprocal(x); }
};

template <>
struct GateParts<bfloat16> {  // together at most 2^-11
  static constexpr float kSlope = 0.3f;
  static constexpr float kTail[] = {2.08844975e-1f, 3.55873741e-2f, 1.37478366e-1f, 1.18204355e-1f};  // 2.3e-4
  static constexpr float kExp2[] = {5.51716685e-2f, 2.42611125e-1f, 6.93260968e-1f, 9.99928057e-1f};  // 7.5e-5
  CK_INLINE Vector<float> exp(Vector<float> x) { return rough_exp_of_negative(kExp2, x); }
  CK_INLINE Vector<float> reciprocal(Vector<float> x) { return rough_reciprocal(x); }
};

template <>
struct GateParts<float> {
  static constexpr float kSlope = 0.35f;
  static constexpr float kTail[] = {-2.91258693e-2f, 1.43872246e-1f,  -2.55504608e-1f,  // relative error 4e-8
                                    1.58929333e-1f,  -2.29371656e-2f, 1.05432950e-1f,
                                    1.19852431e-1f,  1.39859080e-1f,  1.39621571e-1f};
  CK_INLINE Vector<float> exp(Vector<float> x) { return exp_of_negative(x); }
  CK_INLINE Vector<float> reciprocal(Vector<float> x) { return 1.0f / x; }
};

// gate of numbers of type T: the normal distribution function (kTanh: its tanh approximation, the logistic function of
// v(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3)). Both come from the tail at -|x|, which keeps its relative accuracy.
template <class T, bool kTanh>
CK_INLINE Gate<float> gelu_gate(Vector<float> x) {
  using Parts = GateParts<T>;
  const Vector<float> square = x * x;
  Vector<float> tail, slope;
  if constexpr (kTanh) {
    constexpr float kScale = 1.59576912f, kCubic = 0.044715f;
    // The bound keeps 0 * infinity from the slope of large finite x.
    const Vector<float> bounded = square > 1e6f ? broadcast(1e6f) : square;
    const Vector<float> e = Parts::exp(absolute(x) * (bounded * (-kScale * kCubic) - kScale));
    tail = e * Parts::reciprocal(e + 1.0f);
    slope = (tail - tail * tail) * (bounded * (3.0f * kScale * kCubic) + kScale);
  } else {
    const Vector<float> e = Parts::exp(square * -0.5f);
    const Vector<float> q = Parts::reciprocal(absolute(x) * Parts::kSlope + 1.0f);
    tail = polynomial(Parts::kTail, q) * q * e;
    slope = e * 0.398942280f;
  }
  return {x > 0.0f ? 1.0f - tail : tail, slope};
}

template <class T, bool kTanh>
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
