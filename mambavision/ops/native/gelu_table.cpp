#include "gelu_table.h"

#include <algorithm>
#include <cmath>

namespace mambavision {
namespace {

// Interpolates each piece at the four Chebyshev nodes, which is within a factor of two of the best cubic.
GeluTable interpolate(double (*q)(double)) {
  constexpr int kNodes = 4;
  GeluTable table;
  for (int k = 0; k < GeluTable::kPieces; k++) {
    const double low = std::max(k - 0.5, 0.0) / GeluTable::kPiecesPerUnit, high = (k + 0.5) / GeluTable::kPiecesPerUnit;
    double node[kNodes], difference[kNodes];
    for (int i = 0; i < kNodes; i++) {
      node[i] = (low + high) / 2 + (high - low) / 2 * std::cos((2 * i + 1) * M_PI / (2 * kNodes));
      difference[i] = q(node[i]);
    }
    for (int order = 1; order < kNodes; order++)  // Newton's divided differences
      for (int i = kNodes - 1; i >= order; i--)
        difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
    double power[kNodes] = {difference[kNodes - 1]};  // multiplied out, from the innermost factor on
    for (int i = kNodes - 2; i >= 0; i--) {
      for (int j = kNodes - 1; j > 0; j--) power[j] = power[j - 1] - node[i] * power[j];
      power[0] = difference[i] - node[i] * power[0];
    }
    for (int j = 0; j < kNodes; j++) table.coefficient[j][k] = static_cast<float>(power[j]);
  }
  return table;
}

}  // namespace

const GeluTable kGeluExactTable = interpolate([](double x) { return 0.5 * std::erfc(x * M_SQRT1_2); });
const GeluTable kGeluTanhTable = interpolate([](double x) {
  return 1.0 / (1.0 + std::exp(2.0 * M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x)));
});

}  // namespace mambavision
