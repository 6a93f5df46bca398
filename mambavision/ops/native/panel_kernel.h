// Products of the fused inference, panel by block, and what becomes of their sums: bias, activation, residual.
//
// A block of sums is not finished at once but while the matrix units multiply the next one: vector instructions run beside
// theirs, if they stand between them.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

constexpr int64_t kPanelRows = 32, kPanelColumns = 32;  // of sums at once: two tiles down, two across
constexpr int64_t kTileInner = 32;                      // elements that one instruction sums

enum class Activation { none, relu, gelu, gelu_tanh };

// What becomes of a block of a product's sums: out = activation(row_scale * sums + bias) + residual, as bfloat16. Scale,
// residual and activation exclude each other.
struct Finish {
  const float* bias = nullptr;       // one a column
  const float* row_scale = nullptr;  // one a row of sums
  Activation activation = Activation::none;
  const void* residual = nullptr;  // bfloat16
  void* out = nullptr;             // bfloat16
};

// Where rows of a panel's sums go, in elements from Finish's pointers; rows that nobody wants are not among them.
struct PanelRows {
  int64_t count = 0;
  int64_t row[kPanelRows], out[kPanelRows], residual[kPanelRows];
};

// A block of sums that is to be finished: rows of kPanelColumns floats, of which the first `columns` count.
struct WaitingBlock {
  const float* sums = nullptr;
  const PanelRows* rows = nullptr;
  int64_t columns = 0;
  Finish finish;
};

// sums (rows, columns; stride apart), float32, = or += A (rows, inner; lda apart) x B. Rows are even and at most kPanelRows,
// columns are 16 or kPanelColumns. The inner dimension comes in `parts` of `inner` elements, a multiple of kTileInner, which lie
// at A[0], A[1] and so on. B is (parts inner / 2, columns, 2), ldb columns from pair to pair: a pair of consecutive
// inner elements of a column lies together.
struct PanelProduct {
  int64_t rows, columns, inner;
  const void* const* A;  // bfloat16
  int64_t parts, lda;
  const void* B;  // bfloat16
  int64_t ldb;
  float* sums;
  int64_t stride;
  bool accumulate;
};

struct PanelKernels {
  // Multiplies and finishes what waits, if anything does. The matrix units are shaped for it (matrix_units.h).
  void (*multiply)(const PanelProduct& product, const WaitingBlock* waiting);
  void (*finish)(const WaitingBlock& waiting);
};

ISA_DECLARE(PanelKernels, panel_kernels);

}  // namespace mambavision
