// Products of bfloat16 rows with packed weights, summed in float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "matrix_units.h"

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

// Calls multiply(product) for parts of the inner dimension, one after the other.
template <class Multiply>
void in_parts(PanelProduct product, const BFloat16* A, const Multiply& multiply) {
  const BFloat16* B = static_cast<const BFloat16*>(product.B);
  const int64_t parts = (product.inner + kNearInner - 1) / kNearInner, steps = product.inner / kTileInner;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = part * steps / parts * kTileInner, last = (part + 1) * steps / parts * kTileInner;
    const void* from = A + first;
    product.A = &from, product.parts = 1, product.inner = last - first;
    product.B = B + first * product.ldb;
    multiply(product);
    product.accumulate = true;
  }
}

// sums (rows, columns; stride apart) = or += A x a block of a packed weight. Columns are 16 or kPanelColumns.
inline void multiply_block(MatrixUnits& units, int64_t rows, int64_t columns, int64_t inner, const BFloat16* A, int64_t lda,
                           const BFloat16* B, float* sums, int64_t stride, bool accumulate = false) {
  if (inner % kTileInner || rows % 2)
    return units.multiply(rows, columns, inner, A, lda, B, kPanelColumns, sums, stride, accumulate);
  in_parts({rows, columns, inner, nullptr, 1, lda, B, kPanelColumns, sums, stride, accumulate}, A,
           [&](const PanelProduct& product) { units.multiply_panel(product); });
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

}  // namespace mambavision
