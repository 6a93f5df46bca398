// What the normalisation kernels of training and the torch operators that call them agree on: rows of bfloat16 channels.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

enum class NormActivation { none, relu, gelu_tanh };

// y = activation(scale * x + shift), or residual + row_scale * (scale * x + shift); `count` contiguous rows.
struct BatchNorm {
  int64_t channels, rows_per_image;
  NormActivation activation;
  const void* x;
  const float *scale, *shift, *mean;  // one a channel
  const void* residual = nullptr;     // as x; only without an activation
  const float* row_scale = nullptr;   // one an image; likewise
  void* y = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;                 // backward: first what reaches the normalisation, then the gradient
  const float *slope = nullptr, *offset = nullptr;  // dx = scale * d - slope * x + offset
};

// sum = x + row_scale * branch, y = weight * (sum - mean) * inverse + bias, over each row of `channels`.
struct LayerNorm {
  int64_t channels, rows_per_image;
  float eps;
  const void *x, *branch = nullptr;
  const float *row_scale = nullptr, *weight, *bias = nullptr;
  void *sum = nullptr, *y = nullptr;
  float* statistics;                                    // (rows, 2): mean and inverse deviation
  const void *dy = nullptr, *dsum = nullptr;            // backward; dsum may be missing
  void *dx = nullptr, *dbranch = nullptr;
};

struct NormKernels {
  // sums += x - pivot, squares += (x - pivot)^2, a channel each, over rows [begin, end).
  void (*batch_statistics)(const BatchNorm& norm, int64_t begin, int64_t end, const float* pivot, float* sums,
                           float* squares);
  void (*batch_apply)(const BatchNorm& norm, int64_t begin, int64_t end);
  // sums += d, products += d (x - mean) where d, kept in dx, is dy times the activation's derivative and the row's scale.
  void (*batch_reduce)(const BatchNorm& norm, int64_t begin, int64_t end, float* sums, float* products);
  void (*batch_backward)(const BatchNorm& norm, int64_t begin, int64_t end);
  void (*layer_forward)(const LayerNorm& norm, int64_t begin, int64_t end);
  // Adds the gradients of weight and bias to dweight and dbias.
  void (*layer_backward)(const LayerNorm& norm, int64_t begin, int64_t end, float* dweight, float* dbias);
};

ISA_DECLARE(NormKernels, norm_kernels);

}  // namespace mambavision
