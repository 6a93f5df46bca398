// One vector of floats for the instruction set this file is compiled for, and the few functions the kernels need on it.
// Portable through the compilers' vector extensions; AVX-512 replaces what they express badly. Everything has internal
// linkage and no C++ standard header is included: see isa.h for why.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct bfloat16 {
  uint16_t bits;
};

INLINE Vec splat(float value) { return value - Vec{}; }

INLINE Vec load(const float* from) {
  Vec value;
  memcpy(&value, from, sizeof value);
  return value;
}

INLINE Vec load(const bfloat16* from) {
#if defined(__AVX512F__)  // in one instruction, which GCC 12 does not find
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

INLINE void store(float* to, Vec value) { memcpy(to, &value, sizeof value); }

// Rounds to nearest even; a NaN stays one (the carry of the rounding could turn its bits into a zero's).
INLINE Halves to_bfloat16(Vec value) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits result = value == value ? rounded : (bits >> 16) | 0x40u;
  return __builtin_convertvector(result, Halves);
#endif
}

INLINE void store(bfloat16* to, Vec value) {
  const Halves halves = to_bfloat16(value);
  memcpy(to, &halves, sizeof halves);
}

INLINE void store(bfloat16* to, Vec first, Vec second) {  // one after the other
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  store(to, first), store(to + kLanes, second);
#endif
}

// The first `count` lanes only, zeros in the others: the last block of channels.
#if defined(__AVX512F__)
INLINE uint32_t first_lanes(int count) { return count >= kLanes ? 0xffffu : (1u << count) - 1; }
INLINE Vec load(const float* from, int count) { return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), from); }
INLINE Vec load(const bfloat16* from, int count) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from)), 16);
}
INLINE void store(float* to, Vec value, int count) { _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value); }
INLINE void store(bfloat16* to, Vec value, int count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)to_bfloat16(value));
}
#else
template <class T>
INLINE Vec load(const T* from, int count) {
  if (__builtin_expect(count >= kLanes, 1)) return load(from);
  T padded[kLanes] = {};
  for (int lane = 0; lane < count; lane++) padded[lane] = from[lane];
  return load(padded);
}

template <class T>
INLINE void store(T* to, Vec value, int count) {
  if (__builtin_expect(count >= kLanes, 1)) return store(to, value);
  T padded[kLanes];
  store(padded, value);
  for (int lane = 0; lane < count; lane++) to[lane] = padded[lane];
}
#endif

INLINE float to_float(float value) { return value; }
INLINE float to_float(bfloat16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

// A NaN in `a` comes through both.
#if defined(__AVX512F__)  // a NaN stays: the instructions return their second operand
INLINE Vec at_most(Vec a, float limit) { return (Vec)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)a); }
INLINE Vec at_least(Vec a, float limit) { return (Vec)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)a); }
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#else
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec at_most(Vec a, float limit) { return a > limit ? splat(limit) : a; }
INLINE Vec at_least(Vec a, float limit) { return a < limit ? splat(limit) : a; }
#endif
INLINE Vec magnitude(Vec a) { return (Vec)((Bits)a & 0x7fffffffu); }

INLINE bool all_below(Vec a, float limit) {  // false if any lane is a NaN
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
#else
  const Ints below = a < limit;
  int32_t all = -1;
  for (int lane = 0; lane < kLanes; lane++) all &= below[lane];
  return all != 0;
#endif
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kExponentLimit = 126.0f;

#if defined(__AVX512F__)
// 2^(a*b) = power * 2^whole * 2^rest with |rest| <= 1/64, power a root of 2. Adding `magic` leaves the rounded multiple of 1/32
// in the low bits of the sum. The product is rounded once, inside the fused multiply-adds.
struct Exp2Parts {
  Vec power, whole, rest;
};

INLINE Exp2Parts exp2_parts(Vec a, Vec b) {
  alignas(64) static const float kTable[32] = {
      1.000000000f, 1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
      1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
      1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
      1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f, 1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f};
  const Vec magic = splat(393216.0f);  // 1.5 * 2^18: one unit in the last place is 1/32
  const Vec sum = a * b + magic, whole = sum - magic;
  const __m512 low = _mm512_load_ps(kTable), high = _mm512_load_ps(kTable + 16);
  return {(Vec)_mm512_permutex2var_ps(low, (__m512i)sum, high), whole, a * b - whole};
}
#endif

// 2^(a*b) for |a*b| <= 126, relative error below 2e-7.
INLINE Vec exp2_product_bounded(Vec a, Vec b) {
#if defined(__AVX512F__)
  const Exp2Parts parts = exp2_parts(a, b);
  const Vec power = parts.power + parts.power * (parts.rest * (0.693157344f + parts.rest * 0.240226507f));
  return (Vec)_mm512_scalef_ps((__m512)power, (__m512)parts.whole);
#else
  const Vec magic = splat(12582912.0f);  // as above, but one unit in the last place is 1
  const Vec sum = a * b + magic;
  const Vec rest = a * b - (sum - magic);  // in [-1/2, 1/2]
  const Vec power = 1.0f + rest * (0.693147004f + rest * (0.240222424f + rest * (0.0555073358f +
                    rest * (0.00967151299f + rest * 0.00132647273f))));
  return (Vec)((Bits)power + ((Bits)sum << 23));
#endif
}

// 2^(a*b) for |a*b| <= 126 where the result is rounded to bfloat16 soon: relative error below 6e-5 with AVX-512.
INLINE Vec exp2_product_rough(Vec a, Vec b) {
#if defined(__AVX512F__)
  const Exp2Parts parts = exp2_parts(a, b);
  const Vec power = parts.power + parts.power * (0.693147181f * parts.rest);
  return (Vec)_mm512_scalef_ps((__m512)power, (__m512)parts.whole);
#else
  return exp2_product_bounded(a, b);
#endif
}

// 2^(a*b) for any a, b: 0 below 2^-126, infinity above 2^126, NaN stays.
INLINE Vec exp2_product(Vec a, Vec b) {
  const Vec exponent = a * b;
  const Vec bounded = at_most(at_least(exponent, -kExponentLimit), kExponentLimit);
  Vec power = exp2_product_bounded(bounded, splat(1.0f));
  power = exponent < -kExponentLimit ? Vec{} : power;
  return exponent > kExponentLimit ? splat(__builtin_inff()) : power;
}

// e^-|x|, not less than 2^-126: what softplus and its derivative are made of.
INLINE Vec exp_minus_magnitude(Vec x) {
  return exp2_product_bounded(at_most(magnitude(x), kExponentLimit * kLn2), splat(-kLog2E));
}

// log(1 + e^x) given z = e^-|x|: max(x, 0) + log1p(z), the second by a minimax polynomial (relative error 3e-8).
INLINE Vec softplus(Vec x, Vec z) {
  const Vec log1p_over_z = 0.99999994f + z * (-0.49999493f + z * (0.33319098f + z * (-0.24842982f + z * (0.19106007f +
                           z * (-0.13663246f + z * (0.07822596f + z * (-0.02950524f + z * 0.00523269f)))))));
  return at_least(x, 0.0f) + z * log1p_over_z;
}

// The derivative of softplus, 1 / (1 + e^-x), given z = e^-|x|.
INLINE Vec sigmoid(Vec x, Vec z) {
  const Vec denominator = 1.0f + z;
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)denominator);
  const Vec inverse = guess + guess * (1.0f - denominator * guess);  // one Newton step: 14 -> 24 bits
#else
  const Vec inverse = 1.0f / denominator;
#endif
  return x < 0.0f ? z * inverse : inverse;
}

// Into the second-level cache; any address will do, mapped or not.
INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

INLINE float sum_lanes(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += value[lane];
  return sum;
#endif
}

INLINE float largest_lane(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float most = value[0];
  for (int lane = 1; lane < kLanes; lane++) most = value[lane] > most ? value[lane] : most;
  return most;
#endif
}

// totals[i] = the sum of vectors[i]'s lanes, for 16 vectors.
INLINE void sum_lanes_of_16(const Vec* vectors, float* totals) {
#if defined(__AVX512F__)
  // Each step adds one half of a vector's lanes to the other and packs the results of two vectors into one.
  __m512 sums[16];
  for (int i = 0; i < 16; i++) sums[i] = (__m512)vectors[i];
  for (int i = 0; i < 12; i = i == 3 ? 8 : i + 1)
    sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 4], 0x44),
                            _mm512_shuffle_f32x4(sums[i], sums[i + 4], 0xee));
  for (int i = 0; i < 4; i++)
    sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 8], 0x88),
                            _mm512_shuffle_f32x4(sums[i], sums[i + 8], 0xdd));
  for (int i = 0; i < 2; i++)
    sums[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[i], sums[i + 2]), _mm512_unpackhi_ps(sums[i], sums[i + 2]));
  const __m512 sum = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  _mm512_storeu_ps(totals, sum);
#else
  for (int i = 0; i < 16; i++) totals[i] = sum_lanes(vectors[i]);
#endif
}

}  // namespace
