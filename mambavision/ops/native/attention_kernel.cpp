// Softmax of attention and its gradient between matrix products, for one instruction set.
#include "attention_kernel.h"

#include "simd.h"

namespace {

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }

void softmax(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale,
             void* weights, float* inverse_sums, float* log_sums) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; r++) {
    const float* row = scores + r * stride;
    bfloat16* to = (bfloat16*)weights + r * stride;
    Vec most = splat(-__builtin_inff());
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec value = load(row + c);
      most = value > most ? value : most;
    }
    float largest = -__builtin_inff();
    for (int lane = 0; lane < kLanes; lane++) largest = most[lane] > largest ? most[lane] : largest;
    for (int64_t c = whole; c < columns; c++) largest = row[c] > largest ? row[c] : largest;
    Vec sum = {};
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Vec below = at_least((load(row + c) - largest) * (scale * kLog2E), -kExponentLimit);
      Vec power = exp2_product_bounded(below, splat(1.0f));
      if (__builtin_expect(c + kLanes > columns, 0))
        for (int lane = 0; lane < kLanes; lane++) power[lane] = c + lane < columns ? power[lane] : 0.0f;
      sum += power;
      store(to + c, power);
    }
    const float total = sum_lanes(sum);  // a NaN in the row reaches it
    inverse_sums[r] = 1.0f / total;
    log_sums[r] = largest * scale * kLog2E + __builtin_log2f(total);
  }
}

void softmax_backward(const float* scores, const float* dweights, int64_t stride, int64_t rows, int64_t padded,
                      float scale, const float* log_sums, const float* dots, void* weights, void* dscores) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < padded; c += kLanes) {
      const int64_t at = r * stride + c;
      const Vec exponent = at_least(load(scores + at) * (scale * kLog2E) - load(log_sums + c), -kExponentLimit);
      const Vec power = exp2_product_bounded(at_most(exponent, 1.0f), splat(1.0f));
      store((bfloat16*)weights + at, power);
      store((bfloat16*)dscores + at, power * (load(dweights + at) - load(dots + c)) * scale);
    }
}

void scale_rows(const float* sums, int64_t stride, int64_t rows, int64_t columns, const float* factors, void* out,
                int64_t out_stride) {
  for (int64_t r = 0; r < rows; r++) {
    const Vec factor = splat(factors ? factors[r] : 1.0f);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      store((bfloat16*)out + r * out_stride + c, load(sums + r * stride + c, live) * factor, live);
    }
  }
}

void dot_rows(const void* a, const void* b, int64_t stride, int64_t rows, int64_t columns, float* dots) {
  for (int64_t r = 0; r < rows; r++) {
    Vec sum = {};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      sum += load((const bfloat16*)a + r * stride + c, live) * load((const bfloat16*)b + r * stride + c, live);
    }
    dots[r] = sum_lanes(sum);
  }
}

}  // namespace

namespace mambavision {

extern const AttentionKernels ISA_SYMBOL(attention_kernels);
const AttentionKernels ISA_SYMBOL(attention_kernels) = {softmax, softmax_backward, scale_rows, dot_rows};

}  // namespace mambavision
