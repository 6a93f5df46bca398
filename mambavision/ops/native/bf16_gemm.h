// Products of bfloat16 rows with packed weights, summed in float32, on the matrix units that oneDNN finds (AMX, AVX-512).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include "row_kernels.h"

namespace mambavision {

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
  const BFloat16* at(int64_t index) const { return data + index * inner * block; }
};

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

// out = finish(A x weight), block by block of columns; `sums` has room for rows x block floats.
inline void linear(int64_t rows, const BFloat16* A, int64_t lda, const PackedWeight& weight, const RowKernels& kernels,
                   const Finish& finish, float* sums) {
  for (int64_t i = 0; i < weight.blocks; i++) {
    multiply(rows, weight.block, weight.inner, A, lda, weight.at(i), weight.block, sums, weight.block);
    const int64_t column = i * weight.block;
    Finish part = finish;
    if (part.bias) part.bias += column;
    if (part.residual) part.residual = static_cast<const BFloat16*>(part.residual) + column;
    part.out = static_cast<BFloat16*>(part.out) + column;
    kernels.finish(sums, weight.block, rows, weight.block, part);
  }
}

}  // namespace mambavision
