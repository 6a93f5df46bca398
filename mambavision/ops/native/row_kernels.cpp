// Layer normalisation and softmax over rows of bfloat16 and float32, for one instruction set.
#include "row_kernels.h"

#include "isa.h"
#include "simd.h"

namespace {

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }

INLINE Vec clear_from(Vec value, int live) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_mov_ps((__mmask16)first_lanes(live), (__m512)value);
#else
  if (__builtin_expect(live < kLanes, 0))
    for (int lane = live; lane < kLanes; lane++) value[lane] = 0.0f;
  return value;
#endif
}

constexpr int kChains = 4;  // sums at once, as each addition waits for the one before it

// The sum of of(vector's index) over so many vectors, lane by lane.
template <class Of>
INLINE Vec sum_of(int64_t vectors, const Of& of) {
  Vec sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= vectors; i += kChains)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; k++) sums[k] += of(i + k);
  for (; i < vectors; i++) sums[0] += of(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

struct Moments {
  float mean, variance;
};

#if defined(__AVX512BF16__)
// In one pass. What the difference of squares loses, (mean / deviation)^2 times float32's resolution, is less than bfloat16's
// rounding of the inputs has cost.
INLINE Moments moments_of(const bfloat16* from, int64_t columns) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sums[2] = {}, squares[2] = {};
  auto add = [&](__m512i values, int chain) {
    sums[chain] = _mm512_dpbf16_ps(sums[chain], (__m512bh)values, ones);
    squares[chain] = _mm512_dpbf16_ps(squares[chain], (__m512bh)values, (__m512bh)values);
  };
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64)
    add(_mm512_loadu_si512(from + c), 0), add(_mm512_loadu_si512(from + c + 32), 1);
  for (; c < columns; c += 32) {
    const __mmask32 live = columns - c < 32 ? (1u << (columns - c)) - 1 : ~0u;
    add(_mm512_maskz_loadu_epi16(live, from + c), 0);
  }
  const float mean = sum_lanes((Vec)(sums[0] + sums[1])) / columns;
  const float variance = sum_lanes((Vec)(squares[0] + squares[1])) / columns - mean * mean;
  return {mean, variance < 0.0f ? 0.0f : variance};  // a NaN stays
}
#else
INLINE Moments moments_of(const bfloat16* from, int64_t columns) {
  const int64_t whole = columns / kLanes;
  const int rest = (int)(columns % kLanes);
  const float mean = sum_lanes(sum_of(whole, [&](int64_t i) { return load(from + i * kLanes); }) +
                               load(from + whole * kLanes, rest)) / columns;
  auto squared = [&](Vec value) { return (value - mean) * (value - mean); };
  const Vec squares = sum_of(whole, [&](int64_t i) { return squared(load(from + i * kLanes)); });
  return {mean, sum_lanes(squares + clear_from(squared(load(from + whole * kLanes, rest)), rest)) / columns};
}
#endif

void layer_norm(const void* x, int64_t x_stride, int64_t rows, int64_t columns, const float* weight, const float* bias,
                float eps, void* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r++) {
    const bfloat16* from = (const bfloat16*)x + r * x_stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    const Moments moments = moments_of(from, columns);
    const float scale = 1.0f / __builtin_sqrtf(moments.variance + eps), offset = -moments.mean * scale;
    auto result = [&](int64_t c, int live) {
      return (load(from + c, live) * scale + offset) * load(weight + c, live) + load(bias + c, live);
    };
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) store(to + c, result(c, kLanes), result(c + kLanes, kLanes));
    for (; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      store(to + c, result(c, live), live);
    }
  }
}

void softmax(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale, void* out,
             int64_t out_stride, float* inverse_sums) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes, whole = columns / kLanes;
  for (int64_t r = 0; r < rows; r++) {
    const float* row = scores + r * stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    // A partial vector may take scores of the padding into account: any maximum that is not far above the row's will do.
    Vec most = load(row), other = most;
    int64_t i = 1;
    for (; i + 2 <= vectors; i += 2) {
      most = larger(load(row + i * kLanes), most);
      other = larger(load(row + (i + 1) * kLanes), other);
    }
    if (i < vectors) most = larger(load(row + i * kLanes), most);
    const float factor = scale * kLog2E, offset = largest_lane(larger(other, most)) * factor;
    auto power_at = [&](int64_t at) {
      return exp2_product_rough(at_least(load(row + at * kLanes) * factor - offset, -kExponentLimit), splat(1.0f));
    };
    Vec sum = {}, other_sum = {};
    for (i = 0; i + 2 <= whole; i += 2) {
      const Vec power = power_at(i), other_power = power_at(i + 1);
      store(to + i * kLanes, power, other_power);
      sum += power, other_sum += other_power;
    }
    for (; i < vectors; i++) {
      const Vec power = clear_from(power_at(i), live_lanes(columns, i * kLanes));
      store(to + i * kLanes, power);
      sum += power;
    }
    inverse_sums[r] = 1.0f / sum_lanes(sum + other_sum);  // a NaN of the row is in it
    for (int64_t c = vectors * kLanes; c < padded; c += kLanes) store(to + c, Vec{});
  }
}

}  // namespace

namespace mambavision {

extern const RowKernels ISA_SYMBOL(row_kernels);
const RowKernels ISA_SYMBOL(row_kernels) = {layer_norm, softmax};

}  // namespace mambavision
