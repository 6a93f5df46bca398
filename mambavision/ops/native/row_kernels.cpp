// Epilogues, layer normalisation and softmax over rows of bfloat16 and float32, for one instruction set.
#include "row_kernels.h"

#include "gelu_forms.h"
#include "isa.h"
#include "simd.h"

namespace {

using mambavision::Activation;
using mambavision::Finish;

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), for a result that is rounded to bfloat16: relative error of the tail below 2e-4.
INLINE Vec gelu_rough(Vec x) {
  const Vec distance = at_most(magnitude(x), kFar);
  const Vec bell = exp2_product_rough(distance, distance * (-0.5f * kLog2E));
  const Vec denominator = 1.0f + distance * (0.3275911f * 0.707106781f);
#if defined(__AVX512F__)
  const Vec t = (Vec)_mm512_rcp14_ps((__m512)denominator);
#else
  const Vec t = 1.0f / denominator;
#endif
  // Abramowitz and Stegun 7.1.26, halved.
  const Vec tail = bell * t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f +
                   t * 0.5307027145f))));
  return at_least(x, 0.0f) - distance * tail;
}

// The tanh form, x sigmoid(u), likewise. The sigmoid's smallest value is 1e-38 instead of 0.
INLINE Vec gelu_tanh_rough(Vec x) {
  const Vec argument = x * (1.59576912f + 0.0713548162f * (x * x));
  const float limit = kExponentLimit * kLn2;
  const Vec z = exp2_product_rough(at_most(at_least(argument, -limit), limit), splat(-kLog2E));
#if defined(__AVX512F__)
  return x * (Vec)_mm512_rcp14_ps((__m512)(1.0f + z));
#else
  return x / (1.0f + z);
#endif
}

template <Activation kActivation>
INLINE Vec activate(Vec x) {
  if (kActivation == Activation::relu) return at_least(x, 0.0f);
  if (kActivation == Activation::gelu) return gelu_rough(x);
  if (kActivation == Activation::gelu_tanh) return gelu_tanh_rough(x);
  return x;
}

template <Activation kActivation, bool kWhole>
INLINE void finish_rows(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  for (int64_t r = 0; r < rows; r++) {
    const float* from = sums + r * stride;
    const bfloat16* residual = f.residual ? (const bfloat16*)f.residual + r * f.residual_stride : nullptr;
    bfloat16* out = (bfloat16*)f.out + r * f.out_stride;
    const float scale = f.row_scale ? f.row_scale[r] : 1.0f;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = kWhole ? kLanes : live_lanes(columns, c);
      Vec value = load(from + c, live) * scale;
      if (f.bias) value += load(f.bias + c, live);
      value = activate<kActivation>(value);
      if (residual) value += load(residual + c, live);
      store(out + c, value, live);
    }
  }
}

template <Activation kActivation>
void finish_any(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  columns % kLanes == 0 ? finish_rows<kActivation, true>(sums, stride, rows, columns, f)
                        : finish_rows<kActivation, false>(sums, stride, rows, columns, f);
}

void finish(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  switch (f.activation) {
    case Activation::none: return finish_any<Activation::none>(sums, stride, rows, columns, f);
    case Activation::relu: return finish_any<Activation::relu>(sums, stride, rows, columns, f);
    case Activation::gelu: return finish_any<Activation::gelu>(sums, stride, rows, columns, f);
    case Activation::gelu_tanh: return finish_any<Activation::gelu_tanh>(sums, stride, rows, columns, f);
  }
}

INLINE void clear_from(Vec& value, int live) {
  if (__builtin_expect(live < kLanes, 0))
    for (int lane = live; lane < kLanes; lane++) value[lane] = 0.0f;
}

void layer_norm(const void* x, int64_t x_stride, int64_t rows, int64_t columns, const float* weight, const float* bias,
                float eps, void* out, int64_t out_stride) {
  const float share = 1.0f / columns;
  for (int64_t r = 0; r < rows; r++) {
    const bfloat16* from = (const bfloat16*)x + r * x_stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    Vec sum = {}, squares = {};
    for (int64_t c = 0; c < columns; c += kLanes) sum += load(from + c, live_lanes(columns, c));
    const float mean = sum_lanes(sum) * share;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      Vec centred = load(from + c, live) - mean;
      clear_from(centred, live);
      squares += centred * centred;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) * share + eps);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      const Vec normalised = (load(from + c, live) - mean) * scale;
      store(to + c, normalised * load(weight + c, live) + load(bias + c, live), live);
    }
  }
}

void softmax(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale, void* out,
             int64_t out_stride, float* inverse_sums) {
  for (int64_t r = 0; r < rows; r++) {
    const float* row = scores + r * stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    // A partial vector may take scores of the padding into account: any maximum that is not far above the row's will do.
    Vec most = load(row);
    for (int64_t c = kLanes; c < columns; c += kLanes) {
      const Vec value = load(row + c);
      most = value > most ? value : most;
    }
    const float factor = scale * kLog2E, offset = largest_lane(most) * factor;
    Vec sum = {};
    int64_t c = 0;
    for (; c < columns; c += kLanes) {
      Vec power = exp2_product_rough(at_least(load(row + c) * factor - offset, -kExponentLimit), splat(1.0f));
      clear_from(power, live_lanes(columns, c));
      sum += power;
      store(to + c, power);
    }
    for (; c < padded; c += kLanes) store(to + c, Vec{});
    inverse_sums[r] = 1.0f / sum_lanes(sum);  // a NaN of the row is in it
  }
}

}  // namespace

namespace mambavision {

extern const RowKernels ISA_SYMBOL(row_kernels);
const RowKernels ISA_SYMBOL(row_kernels) = {finish, layer_norm, softmax};

}  // namespace mambavision
