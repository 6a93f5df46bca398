// Products of bfloat16 matrices on the processor's matrix units (AMX): eight registers, "tiles", of 16 rows of 64 bytes.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace mambavision {

// Whether this processor has them, the operating system lets us use them and this library was built for them.
bool matrix_units_available();

constexpr int64_t kPanelRows = 32, kPanelColumns = 32;  // of sums at once: two tiles down, two across
constexpr int64_t kTileInner = 32;                      // elements that one instruction sums

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

  // The same for a panel, without any check of what is left over: rows are even and at most kPanelRows, columns are 16 or
  // kPanelColumns, inner a multiple of kTileInner. The inner dimension may come in parts of equal size that lie at A[0],
  // A[1] and so on, and one after the other in B.
  void multiply_panel(int64_t rows, int64_t columns, int64_t inner, const c10::BFloat16* const* A, int64_t parts,
                      int64_t lda, const c10::BFloat16* B, int64_t ldb, float* sums, int64_t stride, bool accumulate);

 private:
  void shape(int64_t rows, int64_t columns, int64_t inner);
  int64_t rows_ = 0, columns_ = 0, inner_ = 0;  // of the tiles
};

}  // namespace mambavision
