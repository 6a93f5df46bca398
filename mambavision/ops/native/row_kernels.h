// What stands between two matrix products of the fused inference: work on rows that are still in the cache.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

struct RowKernels {
  // Rows of `columns` bfloat16 from x (rows x_stride apart) to out (out_stride apart).
  void (*layer_norm)(const void* x, int64_t x_stride, int64_t rows, int64_t columns, const float* weight,
                     const float* bias, float eps, void* out, int64_t out_stride);
  // out = exp(scale * (scores - the row's largest)) as bfloat16, zeros in columns up to `padded`, a multiple of 16;
  // inverse_sums[row] is what the rows then have to be multiplied with. Scores in the padding are finite.
  void (*softmax)(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale, void* out,
                  int64_t out_stride, float* inverse_sums);
};

ISA_DECLARE(RowKernels, row_kernels);

}  // namespace mambavision
