// Products of bfloat16 matrices on the processor's matrix units (AMX): eight registers, "tiles", of 16 rows of 64 bytes.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "panel_kernel.h"

namespace mambavision {

// Whether this processor has them, the operating system lets us use them and this library was built for them.
bool matrix_units_available();

// How to cut rows into panels of equal height, at most kPanelRows: no panel is mostly empty. The last one may reach beyond
// the end, so buffers have room for kPanelRows more.
inline int64_t panel_rows(int64_t rows) {
  const int64_t tiles = 2 * ((rows + kPanelRows - 1) / kPanelRows);
  return 2 * ((rows + tiles - 1) / tiles);
}

// How far apart rows of so many elements lie best: not a power of two, which would crowd them into a few sets of the cache.
inline int64_t row_stride(int64_t columns) { return columns % 128 == 0 ? columns + kTileInner : columns; }

// What a thread multiplies with. Sets the tiles up, and gives them back, as ATen's own kernels need it.
class MatrixUnits {
 public:
  MatrixUnits();
  ~MatrixUnits();
  MatrixUnits(const MatrixUnits&) = delete;

  // sums (rows, columns; stride apart), float32, = or += A (rows, inner; lda apart) x B. B is (inner / 2, columns, 2), ldb
  // columns from pair to pair: a pair of consecutive inner elements of a column lies together.
  void multiply(int64_t rows, int64_t columns, int64_t inner, const c10::BFloat16* A, int64_t lda, const c10::BFloat16* B,
                int64_t ldb, float* sums, int64_t stride, bool accumulate = false);

  // The same for a panel, without any check of what is left over, and while finishing what waits, if anything does.
  void multiply_panel(const PanelProduct& product, const WaitingBlock* waiting = nullptr);

 private:
  void shape(int64_t rows, int64_t columns, int64_t inner);
  int64_t rows_ = 0, columns_ = 0, inner_ = 0;  // of the tiles
};

}  // namespace mambavision
