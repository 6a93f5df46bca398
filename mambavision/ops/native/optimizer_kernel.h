// What the optimizer's kernels and the torch operators that call them agree on. All arrays are float32, without gaps.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

struct LambChunk {
  const float* parameter;
  const float* gradient;
  float *first_moment, *second_moment;
  float* update;  // written: weight decay * w + adam(g)
  int64_t size;
};

struct LambScalars {
  float gradient_scale;  // what the clip multiplies gradients by
  float beta2, eps, weight_decay;
  float one_minus_beta1, one_minus_beta2;  // not left to float32: 1 - 0.999 would lose half its digits
  float inverse_correction1;       // 1 / (1 - beta1^step)
  float inverse_root_correction2;  // 1 / sqrt(1 - beta2^step)
};

struct SquaredNorms {
  double parameter, update;
};

struct OptimizerKernels {
  double (*sum_of_squares)(const float* values, int64_t size);
  SquaredNorms (*lamb_direction)(const LambChunk& chunk, const LambScalars& scalars);
  void (*subtract)(float* parameter, const float* update, float factor, int64_t size);     // w -= factor * update
  void (*move_towards)(float* average, const float* value, float weight, int64_t size);  // a += weight * (value - a)
};

ISA_DECLARE(OptimizerKernels, optimizer_kernels);

}  // namespace mambavision
