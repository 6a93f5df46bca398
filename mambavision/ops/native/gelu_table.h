// The tail of GELU as cubics over sixteen pieces: few enough for one register a coefficient, exact enough for bfloat16.
#pragma once

namespace mambavision {

// gelu(x) = max(x, 0) - |x| q(|x|). Piece k holds distances within half a piece of k / kPiecesPerUnit; coefficient[i][k]
// belongs to distance^i.
struct GeluTable {
  static constexpr int kPieces = 16;
  static constexpr float kFar = 5.0f;  // q is taken as constant beyond: |x| q(|x|) is below 2e-6 there
  static constexpr float kPiecesPerUnit = (kPieces - 0.51f) / kFar;  // kFar stays in the last piece
  float coefficient[4][kPieces];
};

extern const GeluTable kGeluExactTable;  // q(x) = Phi(-x), the normal distribution
extern const GeluTable kGeluTanhTable;   // q(x) = sigmoid(-2 sqrt(2/pi) (x + 0.044715 x^3))

}  // namespace mambavision
