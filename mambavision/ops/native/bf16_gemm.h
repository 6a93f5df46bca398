// Products of bfloat16 rows with packed weights, summed in float32, and what is done with the sums while they are near.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "matrix_units.h"
#include "row_kernels.h"

namespace mambavision {

using c10::BFloat16;

// A weight (columns, inner) of a linear layer, cut into blocks of kPanelColumns columns, the last one padded with zeros:
// (blocks, inner / 2, 2 kPanelColumns), so that a pair of consecutive inner elements of a column lies together, as the matrix
// units want it. Not of four dimensions, which module.to(memory_format=torch.channels_last) would reorder.
struct PackedWeight {
  const BFloat16* data;
  int64_t blocks, inner;

  explicit PackedWeight(const at::Tensor& packed)
      : data(packed.const_data_ptr<BFloat16>()), blocks(packed.size(0)), inner(2 * packed.size(1)) {
    TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() && packed.is_cpu() && packed.size(2) == 2 * kPanelColumns,
                "a packed weight is (blocks, inner / 2, ", 2 * kPanelColumns, "), got ", packed.sizes());
  }
  bool has_columns(int64_t columns) const { return blocks == (columns + kPanelColumns - 1) / kPanelColumns; }
  // A block of columns, from this inner element (an even one) on.
  const BFloat16* at(int64_t index, int64_t first = 0) const { return data + (index * inner + first) * kPanelColumns; }
};

constexpr int64_t kNearInner = 512;  // elements of the inner dimension at once: a panel's part of them stays near

// sums (rows, columns; stride apart) = or += A x a block of a packed weight; rows and columns as multiply_panel wants them.
inline void multiply_block(MatrixUnits& units, int64_t rows, int64_t columns, int64_t inner, const BFloat16* A, int64_t lda,
                           const BFloat16* B, float* sums, int64_t stride, bool accumulate = false) {
  if (inner % kTileInner || rows % 2)
    return units.multiply(rows, columns, inner, A, lda, B, kPanelColumns, sums, stride, accumulate);
  const int64_t parts = (inner + kNearInner - 1) / kNearInner, steps = inner / kTileInner;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = part * steps / parts * kTileInner, last = (part + 1) * steps / parts * kTileInner;
    const BFloat16* from = A + first;
    units.multiply_panel(rows, columns, last - first, &from, 1, lda, B + first * kPanelColumns, kPanelColumns, sums, stride,
                         accumulate || part > 0);
  }
}

// What becomes of the part of the sums that starts there.
inline Finish part_at(Finish finish, int64_t row, int64_t column) {
  if (finish.bias) finish.bias += column;
  if (finish.residual)
    finish.residual = static_cast<const BFloat16*>(finish.residual) + row * finish.residual_stride + column;
  finish.out = static_cast<BFloat16*>(finish.out) + row * finish.out_stride + column;
  return finish;
}

constexpr int64_t kWeightBytes = 640 << 10;  // of a weight that stay in the second-level cache while rows go by

// Calls done(first column, columns, sums) after a panel was multiplied with each block from `first` to `last`.
template <class Done>
void multiply_blocks(MatrixUnits& units, int64_t rows, const BFloat16* A, int64_t lda, const PackedWeight& weight,
                     int64_t first, int64_t last, int64_t columns, const Done& done) {
  alignas(64) float sums[kPanelRows * kPanelColumns];
  for (int64_t block = first; block < last; block++) {
    const int64_t column = block * kPanelColumns, live = std::min(kPanelColumns, columns - column);
    multiply_block(units, rows, live, weight.inner, A, lda, weight.at(block), sums, kPanelColumns);
    done(column, live, sums);
  }
}

// out (rows, columns) = finish(A x weight). Rows of A up to a whole panel are read, so they must be there.
inline void linear(MatrixUnits& units, int64_t rows, const BFloat16* A, int64_t lda, const PackedWeight& weight,
                   int64_t columns, const RowKernels& kernels, const Finish& finish) {
  const int64_t some = std::max<int64_t>(1, kWeightBytes / (2 * weight.inner * kPanelColumns)), height = panel_rows(rows);
  for (int64_t first = 0; first < weight.blocks; first += some)
    for (int64_t row = 0; row < rows; row += height)
      multiply_blocks(units, height, A + row * lda, lda, weight, first, std::min(first + some, weight.blocks), columns,
                      [&](int64_t column, int64_t live, const float* sums) {
                        kernels.finish(sums, kPanelColumns, std::min(height, rows - row), live, part_at(finish, row, column));
                      });
}

}  // namespace mambavision
