// LAMB, the moving average of the weights and the gradient norm over one piece of memory, for one instruction set.
#include "optimizer_kernel.h"

#include "isa.h"
#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using mambavision::LambChunk;
using mambavision::LambScalars;
using mambavision::OptimizerKernels;
using mambavision::SquaredNorms;

// Squares are added up in float32 over so many elements, in float64 beyond.
constexpr int64_t kBlock = 64 * kLanes;

INLINE Vec square_root(Vec value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)value);
#elif defined(__x86_64__)
  return (Vec)_mm_sqrt_ps((__m128)value);
#else
  for (int lane = 0; lane < kLanes; lane++) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

INLINE Vec keep_first(Vec value, int count) {
  for (int lane = count; lane < kLanes; lane++) value[lane] = 0.0f;
  return value;
}

// Calls body(index, lanes in use) for every vector of [begin, end); the last may be partly used.
template <class Body>
INLINE void for_each_vector(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, (int)(end - i));
}

double sum_of_squares(const float* values, int64_t size) {
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    Vec sum = {};
    for_each_vector(begin, begin + kBlock < size ? begin + kBlock : size, [&](int64_t i, int count)
                        __attribute__((always_inline)) {
                          const Vec value = load(values + i, count);
                          sum += value * value;
                        });
    total += sum_lanes(sum);
  }
  return total;
}

// You et al. (arXiv 1904.00962), algorithm 2: the moments, and the direction before it is scaled by the trust ratio.
SquaredNorms lamb_direction(const LambChunk& c, const LambScalars& s) {
  SquaredNorms total = {0, 0};
  for (int64_t begin = 0; begin < c.size; begin += kBlock) {
    Vec parameter_sum = {}, update_sum = {};
    for_each_vector(begin, begin + kBlock < c.size ? begin + kBlock : c.size, [&](int64_t i, int count)
                        __attribute__((always_inline)) {
                          const Vec w = load(c.parameter + i, count);
                          const Vec g = load(c.gradient + i, count) * s.gradient_scale;
                          Vec m = load(c.first_moment + i, count), v = load(c.second_moment + i, count);
                          m += s.one_minus_beta1 * (g - m);
                          v = s.beta2 * v + s.one_minus_beta2 * (g * g);
                          store(c.first_moment + i, m, count);
                          store(c.second_moment + i, v, count);
                          const Vec denominator = square_root(v) * s.inverse_root_correction2 + s.eps;
                          Vec update = m * s.inverse_correction1 / denominator + s.weight_decay * w;
                          if (count < kLanes) update = keep_first(update, count);  // 0 / 0 where eps is 0
                          store(c.update + i, update, count);
                          parameter_sum += w * w;
                          update_sum += update * update;
                        });
    total.parameter += sum_lanes(parameter_sum);
    total.update += sum_lanes(update_sum);
  }
  return total;
}

void subtract(float* parameter, const float* update, float factor, int64_t size) {
  for_each_vector(0, size, [&](int64_t i, int count) __attribute__((always_inline)) {
    store(parameter + i, load(parameter + i, count) - factor * load(update + i, count), count);
  });
}

void move_towards(float* average, const float* value, float weight, int64_t size) {
  for_each_vector(0, size, [&](int64_t i, int count) __attribute__((always_inline)) {
    const Vec old = load(average + i, count);
    store(average + i, old + weight * (load(value + i, count) - old), count);
  });
}

}  // namespace

namespace mambavision {

extern const OptimizerKernels ISA_SYMBOL(optimizer_kernels);
const OptimizerKernels ISA_SYMBOL(optimizer_kernels) = {sum_of_squares, lamb_direction, subtract, move_towards};

}  // namespace mambavision
