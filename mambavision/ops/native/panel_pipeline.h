// Products whose blocks of sums are finished while the next block is multiplied: what the fused inference is made of.
#pragma once

#include <algorithm>

#include "bf16_gemm.h"
#include "isa.h"

namespace mambavision {

// The first product after finish_later() finishes what waits; flush() does it at once. A result is there after that.
class PanelPipeline {
 public:
  explicit PanelPipeline(MatrixUnits& units) : units_(units) {}

  // Begins a panel; says where its rows go until the next but one begins.
  PanelRows& next_rows() {
    panel_ ^= 1;
    rows_[panel_].count = 0;
    return rows_[panel_];
  }
  // The same for rows that lie regularly, `count` of them.
  void next_rows(int64_t count, int64_t out_stride, int64_t residual_stride = 0) {
    PanelRows& rows = next_rows();
    rows.count = count;
    for (int64_t r = 0; r < count; r++) rows.row[r] = r, rows.out[r] = r * out_stride, rows.residual[r] = r * residual_stride;
  }

  float* sums() { return sums_[block_]; }  // (kPanelRows, kPanelColumns), free until finish_later() has been called on them

  void multiply(const PanelProduct& product) {
    units_.multiply_panel(product, waiting_.sums ? &waiting_ : nullptr);
    waiting_.sums = nullptr;
  }

  // sums (rows, columns; stride apart) = or += A (rows, inner; lda apart) x a block of a packed weight.
  void multiply(int64_t rows, int64_t columns, int64_t inner, const BFloat16* A, int64_t lda, const BFloat16* B, float* sums,
                int64_t stride, bool accumulate = false) {
    if (inner % kTileInner || rows % 2) {
      flush();
      return units_.multiply(rows, columns, inner, A, lda, B, kPanelColumns, sums, stride, accumulate);
    }
    in_parts({rows, columns, inner, nullptr, 1, lda, B, kPanelColumns, sums, stride, accumulate}, A,
             [&](const PanelProduct& product) { multiply(product); });
  }

  // Of this panel. `finish` starts at the block's first column.
  void finish_later(const float* sums, int64_t columns, const Finish& finish) {
    flush();
    waiting_ = {sums, &rows_[panel_], columns, finish};
    if (sums == sums_[block_]) block_ ^= 1;
  }

  void flush() {
    if (waiting_.sums) ISA_TABLE(panel_kernels).finish(waiting_);
    waiting_.sums = nullptr;
  }

 private:
  MatrixUnits& units_;
  alignas(64) float sums_[2][kPanelRows * kPanelColumns];
  PanelRows rows_[2];
  WaitingBlock waiting_;
  int block_ = 0, panel_ = 0;
};

inline Finish into(BFloat16* out, const float* bias = nullptr, Activation activation = Activation::none) {
  Finish finish;
  finish.out = out, finish.bias = bias, finish.activation = activation;
  return finish;
}

inline Finish added_to(const BFloat16* residual, BFloat16* out, const float* bias = nullptr) {
  Finish finish = into(out, bias);
  finish.residual = residual;
  return finish;
}

// What becomes of the sums that start at this row and column, where rows of out and residual are so far apart.
inline Finish part_at(Finish finish, int64_t row, int64_t column, int64_t out_stride, int64_t residual_stride = 0) {
  if (finish.bias) finish.bias += column;
  if (finish.residual) finish.residual = static_cast<const BFloat16*>(finish.residual) + row * residual_stride + column;
  finish.out = static_cast<BFloat16*>(finish.out) + row * out_stride + column;
  return finish;
}

// out (rows, columns) = finish(A x weight), rows of out and residual so far apart. Rows of A up to a whole panel are read, so
// they must be there.
inline void linear(PanelPipeline& pipeline, int64_t rows, const BFloat16* A, int64_t lda, const PackedWeight& weight,
                   int64_t columns, const Finish& finish, int64_t out_stride, int64_t residual_stride = 0) {
  const int64_t some = std::max<int64_t>(1, kWeightBytes / (2 * weight.inner * kPanelColumns)), height = panel_rows(rows);
  for (int64_t first = 0; first < weight.blocks; first += some)
    for (int64_t row = 0; row < rows; row += height) {
      pipeline.next_rows(std::min(height, rows - row), out_stride, residual_stride);
      for (int64_t block = first; block < std::min(first + some, weight.blocks); block++) {
        const int64_t column = block * kPanelColumns, live = std::min(kPanelColumns, columns - column);
        pipeline.multiply(height, live, weight.inner, A + row * lda, lda, weight.at(block), pipeline.sums(), kPanelColumns);
        pipeline.finish_later(pipeline.sums(), live, part_at(finish, row, column, out_stride, residual_stride));
      }
    }
  pipeline.flush();
}

}  // namespace mambavision
