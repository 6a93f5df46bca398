// What stands between the matrix products of attention in training: softmax, its gradient, scaled rows.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

// Scores and their gradients are float32 rows `stride` elements apart, as are the bfloat16 rows made of them; `padded`
// columns, a multiple of 16, of which `columns` exist.
struct AttentionKernels {
  // weights = exp(scale * (scores - the row's largest)), zero beyond the columns; inverse_sums[row]: what makes them sum to
  // one; log_sums[row], in units of log2: scores * scale * log2(e) - log_sums is the exponent of the normalised weights.
  void (*softmax)(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale,
                  void* weights, float* inverse_sums, float* log_sums);
  // With keys in rows and queries in columns: weights = 2^(scores * scale * log2(e) - log_sums[column]) and
  // dscores = scale * weights * (dweights - dots[column]).
  void (*softmax_backward)(const float* scores, const float* dweights, int64_t stride, int64_t rows, int64_t padded,
                           float scale, const float* log_sums, const float* dots, void* weights, void* dscores);
  // out[row] = factors[row] * sums[row] as bfloat16; factors may be null.
  void (*scale_rows)(const float* sums, int64_t stride, int64_t rows, int64_t columns, const float* factors, void* out,
                     int64_t out_stride);
  // dots[row] = a[row] . b[row], bfloat16 rows.
  void (*dot_rows)(const void* a, const void* b, int64_t stride, int64_t rows, int64_t columns, float* dots);
};

ISA_DECLARE(AttentionKernels, attention_kernels);

}  // namespace mambavision
