// How rows are rearranged for the matrix units, and what becomes of the sums they return, in training.
// The units multiply bfloat16 rows A (rows, inner) with B (inner / 2, columns, 2): pairs of consecutive inner elements of a
// column lie together, here as one uint32_t.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

struct Matrix {  // float32 or bfloat16, rows `stride` elements apart
  const void* data;
  bool bfloat16;
  int64_t rows, columns, stride;
};

struct ProductFinish {
  const float* bias = nullptr;        // one a column
  bool gelu = false;                  // out = gelu(sums + bias), exact, and `derivative` that of gelu
  const void* factor = nullptr;       // bfloat16, as out: out = sums * factor
  void* out = nullptr;                // bfloat16
  void* derivative = nullptr;         // bfloat16, as out
  int64_t stride = 0;                 // of out, factor and derivative
};

struct PackKernels {
  // out[r / 2][c] = (in[r][c], in[r + 1][c]); a row beyond the last counts as zeros, columns from in.columns to `padded`
  // are set to zero. Adds the columns' sums of `in`, as they are before rounding, to `sums` if that is there.
  void (*pair_rows)(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t padded, float* sums);
  // out[c / 2][r] = (in[r][c], in[r][c + 1]); likewise, rows from in.rows to `padded` are zero.
  void (*pair_columns)(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t padded);
  // out[c][r / 2] = (in[r][c], in[r + 1][c]): bfloat16 rows, transposed; pairs up to `pairs` beyond the last are zero.
  // Adds the columns' sums as pair_rows does.
  void (*transpose)(const Matrix& in, uint32_t* out, int64_t out_stride, int64_t pairs, float* sums);
  // out = the sum over `slots` of in + slot * slot_stride, (rows <= 16, columns), or its transpose.
  void (*reduce)(const float* in, int64_t slots, int64_t slot_stride, int64_t stride, int64_t rows, int64_t columns,
                 bool transposed, float* out, int64_t out_stride);
  void (*finish)(const float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductFinish& finish);
};

ISA_DECLARE(PackKernels, pack_kernels);

}  // namespace mambavision
