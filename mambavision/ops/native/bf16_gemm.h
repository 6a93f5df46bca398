// Products of bfloat16 rows with packed weights, summed in float32, on the matrix units that oneDNN finds (AMX, AVX-512).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#if __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define MAMBAVISION_MATRIX_UNITS  // this torch lets us use them
#endif

#include "row_kernels.h"

namespace mambavision {

// Whether this torch and this processor have them; the products below are refused elsewhere.
inline bool matrix_units_available() {
#if defined(MAMBAVISION_MATRIX_UNITS)
  return at::native::cpublas::could_pack(at::kBFloat16);
#else
  return false;
#endif
}

#if defined(MAMBAVISION_MATRIX_UNITS)

using c10::BFloat16;

// A weight (columns, inner) of a linear layer, cut into blocks of columns: (blocks, inner / 2, 2 block), so that a pair of
// consecutive inner elements of a column lies together, as the matrix units want it. Not of four dimensions, which
// module.to(memory_format=torch.channels_last) would reorder.
struct PackedWeight {
  const BFloat16* data;
  int64_t blocks, inner, block;

  explicit PackedWeight(const at::Tensor& packed)
      : data(packed.const_data_ptr<BFloat16>()),
        blocks(packed.size(0)),
        inner(2 * packed.size(1)),
        block(packed.size(2) / 2) {
    TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() && packed.is_cpu(),
                "a packed weight is (blocks, inner / 2, 2 block), got ", packed.sizes());
  }
  int64_t columns() const { return blocks * block; }
  // A block of columns, from this inner element (an even one) on.
  const BFloat16* at(int64_t index, int64_t first = 0) const { return data + (index * inner + first) * block; }
};

// A, B and sums should start at cache lines and rows be whole ones, the inner width a multiple of 32: else the units are slow.
// sums (rows, columns; stride apart) = or += A (rows, inner; lda apart) x B, B as (inner / 2, columns, 2) with ldb columns.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const BFloat16* A, int64_t lda, const BFloat16* B,
                     int64_t ldb, float* sums, int64_t stride, bool accumulate = false) {
  at::native::cpublas::brgemm(rows, columns, inner, lda, ldb, stride, accumulate, A, B, sums, /*is_vnni=*/true);
}

// A thread that used the matrix units gives them back; ATen's own kernels need it so.
struct MatrixUnits {
  MatrixUnits() = default;
  MatrixUnits(const MatrixUnits&) = delete;
  ~MatrixUnits() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }
};

constexpr int64_t kProductRows = 224;  // fewer would read the weight too often, more would not fit beside it in the cache

// out = finish(A x weight), one block of columns after the other: all of them, or `count` from `first` on, whose first column
// is then the first of `finish`. `sums` has room for kProductRows x block floats.
inline void linear(int64_t rows, const BFloat16* A, int64_t lda, const PackedWeight& weight, const RowKernels& kernels,
                   const Finish& finish, float* sums, int64_t first = 0, int64_t count = -1) {
  if (count < 0) count = weight.blocks;
  for (int64_t i = 0; i < count; i++) {
    const int64_t column = i * weight.block;
    for (int64_t row = 0; row < rows; row += kProductRows) {
      const int64_t some = rows - row < kProductRows ? rows - row : kProductRows;
      multiply(some, weight.block, weight.inner, A + row * lda, lda, weight.at(first + i), weight.block, sums, weight.block);
      Finish part = finish;
      if (part.bias) part.bias += column;
      if (part.residual)
        part.residual = static_cast<const BFloat16*>(part.residual) + row * part.residual_stride + column;
      part.out = static_cast<BFloat16*>(part.out) + row * part.out_stride + column;
      kernels.finish(sums, weight.block, some, weight.block, part);
    }
  }
}

#endif

}  // namespace mambavision
