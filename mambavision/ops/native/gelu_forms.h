// GELU, exact and in its tanh form, with its derivative: one exponential an element.
#pragma once

#include "simd.h"

namespace {

constexpr float kFar = 13.0f;  // beyond this the normal density is below 2^-121: the tails are as good as zero

INLINE Vec inverse(Vec denominator) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)denominator);
  return guess + guess * (1.0f - denominator * guess);  // one Newton step: 14 -> 24 bits
#else
  return 1.0f / denominator;
#endif
}

struct GeluValue {
  Vec gate;        // gelu(x) = x * gate
  Vec derivative;  // of gelu
};

// gate = Phi(x), the normal distribution; its tail by Abramowitz and Stegun 7.1.26 (absolute error below 1e-7), which
// shares its exponential with the density that the derivative needs: Phi(x) + x phi(x).
INLINE GeluValue gelu_exact(Vec x) {
  const Vec distance = at_most(magnitude(x), kFar);
  const Vec bell = exp2_product_bounded(distance, distance * (-0.5f * kLog2E));  // e^(-x^2/2)
  const Vec t = inverse(1.0f + distance * (0.3275911f * 0.707106781f));
  const Vec tail = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f +
                   t * 1.061405429f))));
  const Vec gate = x < 0.0f ? tail : 1.0f - tail;
  return {gate, gate + x * bell * 0.398942280f};
}

// gate = (1 + tanh(u)) / 2 = sigmoid(2 u),  u = sqrt(2/pi) (x + 0.044715 x^3).
INLINE GeluValue gelu_tanh(Vec x) {
  const Vec near = at_least(at_most(x, kFar), -kFar);  // where the sigmoid is 0 or 1 the cube must not overflow
  const Vec square = near * near;
  const Vec argument = 1.59576912f * near * (1.0f + 0.044715f * square);
  const Vec z = exp_minus_magnitude(argument), share = inverse(1.0f + z);
  const Vec gate = argument < 0.0f ? z * share : share;
  const Vec slope = z * share * share;  // gate (1 - gate), without the cancellation
  return {gate, gate + near * slope * (1.59576912f * (1.0f + 0.134145f * square))};
}

}  // namespace
