// GELU, exact and in its tanh form, forward and backward, for one instruction set: one exponential an element.
#include "gelu_kernel.h"

#include "isa.h"
#include "simd.h"

namespace {

using mambavision::Gelu;

constexpr float kFar = 13.0f;  // beyond this the normal density is below 2^-121: the tails are as good as zero

INLINE Vec inverse(Vec denominator) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)denominator);
  return guess + guess * (1.0f - denominator * guess);  // one Newton step: 14 -> 24 bits
#else
  return 1.0f / denominator;
#endif
}

struct Value {
  Vec gate;        // gelu(x) = x * gate
  Vec derivative;  // of gelu
};

// gate = Phi(x), the normal distribution; its tail by Abramowitz and Stegun 7.1.26 (absolute error below 1e-7), which
// shares its exponential with the density that the derivative needs: Phi(x) + x phi(x).
INLINE Value exact(Vec x) {
  const Vec distance = at_most(magnitude(x), kFar);
  const Vec bell = exp2_product_bounded(distance, distance * (-0.5f * kLog2E));  // e^(-x^2/2)
  const Vec t = inverse(1.0f + distance * (0.3275911f * 0.707106781f));
  const Vec tail = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f +
                   t * 1.061405429f))));
  const Vec gate = x < 0.0f ? tail : 1.0f - tail;
  return {gate, gate + x * bell * 0.398942280f};
}

// gate = (1 + tanh(u)) / 2 = sigmoid(2 u),  u = sqrt(2/pi) (x + 0.044715 x^3).
INLINE Value tanh_form(Vec x) {
  const Vec near = at_least(at_most(x, kFar), -kFar);  // where the sigmoid is 0 or 1 the cube must not overflow
  const Vec square = near * near;
  const Vec argument = 1.59576912f * near * (1.0f + 0.044715f * square);
  const Vec z = exp_minus_magnitude(argument), share = inverse(1.0f + z);
  const Vec gate = argument < 0.0f ? z * share : share;
  const Vec slope = z * share * share;  // gate (1 - gate), without the cancellation
  return {gate, gate + near * slope * (1.59576912f * (1.0f + 0.134145f * square))};
}

template <class T, Value kForm(Vec), bool kBackward>
INLINE void one_vector(const Gelu& gelu, int64_t at, int count) {
  const Vec x = load((const T*)gelu.x + at, count);
  const Value value = kForm(x);
  const Vec out = kBackward ? load((const T*)gelu.dy + at, count) * value.derivative : x * value.gate;
  store((T*)gelu.out + at, out, count);
}

template <class T, Value kForm(Vec), bool kBackward>
void run(const Gelu& gelu, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {  // two chains of operations at a time
    one_vector<T, kForm, kBackward>(gelu, at, kLanes);
    one_vector<T, kForm, kBackward>(gelu, at + kLanes, kLanes);
  }
  for (; at < end; at += kLanes) one_vector<T, kForm, kBackward>(gelu, at, (int)(end - at < kLanes ? end - at : kLanes));
}

template <bool kBackward>
void dispatch(const Gelu& gelu, int64_t begin, int64_t end) {
  if (gelu.bfloat16)
    gelu.tanh_form ? run<bfloat16, tanh_form, kBackward>(gelu, begin, end)
                   : run<bfloat16, exact, kBackward>(gelu, begin, end);
  else
    gelu.tanh_form ? run<float, tanh_form, kBackward>(gelu, begin, end) : run<float, exact, kBackward>(gelu, begin, end);
}

}  // namespace

namespace mambavision {

extern const GeluKernels ISA_SYMBOL(gelu_kernels);
const GeluKernels ISA_SYMBOL(gelu_kernels) = {dispatch<false>, dispatch<true>};

}  // namespace mambavision
