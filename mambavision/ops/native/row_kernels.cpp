// Epilogues, layer normalisation and softmax over rows of bfloat16 and float32, for one instruction set.
#include "row_kernels.h"

#include "gelu_forms.h"
#include "isa.h"
#include "simd.h"

namespace {

using mambavision::Activation;
using mambavision::Finish;

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }

template <Activation kActivation>
INLINE Vec activate(Vec x) {
  if (kActivation == Activation::relu) return at_least(x, 0.0f);
  if (kActivation == Activation::gelu) return x * gelu_exact(x).gate;
  if (kActivation == Activation::gelu_tanh) return x * gelu_tanh(x).gate;
  return x;
}

template <Activation kActivation>
void finish_rows(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  for (int64_t r = 0; r < rows; r++) {
    const float* from = sums + r * stride;
    const bfloat16* residual = f.residual ? (const bfloat16*)f.residual + r * f.residual_stride : nullptr;
    bfloat16* out = (bfloat16*)f.out + r * f.out_stride;
    const Vec scale = splat(f.row_scale ? f.row_scale[r] : 1.0f);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      Vec value = load(from + c, live) * scale;
      if (f.bias) value += load(f.bias + c, live);
      value = activate<kActivation>(value);
      if (residual) value += load(residual + c, live);
      store(out + c, value, live);
    }
  }
}

void finish(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  switch (f.activation) {
    case Activation::none: return finish_rows<Activation::none>(sums, stride, rows, columns, f);
    case Activation::relu: return finish_rows<Activation::relu>(sums, stride, rows, columns, f);
    case Activation::gelu: return finish_rows<Activation::gelu>(sums, stride, rows, columns, f);
    case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh>(sums, stride, rows, columns, f);
  }
}

void layer_norm(const void* x, int64_t x_stride, int64_t rows, int64_t columns, const float* weight, const float* bias,
                float eps, void* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r++) {
    const bfloat16* from = (const bfloat16*)x + r * x_stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    Vec sum = {};
    for (int64_t c = 0; c < columns; c += kLanes) sum += load(from + c, live_lanes(columns, c));
    const float mean = sum_lanes(sum) / columns;
    Vec squares = {};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      Vec centred = load(from + c, live) - mean;
      if (__builtin_expect(live < kLanes, 0))
        for (int lane = live; lane < kLanes; lane++) centred[lane] = 0.0f;
      squares += centred * centred;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / columns + eps);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      const Vec normalised = (load(from + c, live) - mean) * scale;
      store(to + c, normalised * load(weight + c, live) + load(bias + c, live), live);
    }
  }
}

void softmax(float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale, void* out,
             int64_t out_stride, float* inverse_sums) {
  for (int64_t r = 0; r < rows; r++) {
    float* row = scores + r * stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    for (int64_t c = columns; c < padded; c++) row[c] = -__builtin_inff();
    Vec most = splat(-__builtin_inff());
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Vec value = load(row + c);
      most = value > most ? value : most;
    }
    float largest = most[0];
    for (int lane = 1; lane < kLanes; lane++) largest = most[lane] > largest ? most[lane] : largest;
    Vec sum = {};
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Vec below = at_least((load(row + c) - largest) * (scale * kLog2E), -kExponentLimit);
      const Vec power = exp2_product_bounded(below, splat(1.0f));
      sum += power;
      store(to + c, power);
    }
    // Padding columns hold 2^-126, zero in bfloat16's products for all purposes; a NaN in the row reaches the sum.
    inverse_sums[r] = 1.0f / sum_lanes(sum);
  }
}

}  // namespace

namespace mambavision {

extern const RowKernels ISA_SYMBOL(row_kernels);
const RowKernels ISA_SYMBOL(row_kernels) = {finish, layer_norm, softmax};

}  // namespace mambavision
