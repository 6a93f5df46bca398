// Products on the matrix units with the finish of the block before between their instructions, for one instruction set.
#include "panel_kernel.h"

#include "gelu_table.h"
#include "isa.h"
#include "matrix_tiles.h"
#include "simd.h"

namespace {

using mambavision::Activation;
using mambavision::Finish;
using mambavision::GeluTable;
using mambavision::kPanelColumns;
using mambavision::PanelProduct;
using mambavision::PanelRows;
using mambavision::WaitingBlock;

// GELU for a result that is rounded to bfloat16: absolute error below 3e-6, relative error below 3e-4 down to x = -3.
INLINE Vec gelu_rough(Vec x, const GeluTable& table) {
#if defined(__AVX512F__)
  const Vec distance = (Vec)_mm512_range_ps((__m512)x, _mm512_set1_ps(GeluTable::kFar), 0b1010);  // smaller magnitude, positive
  // A number so large that its last bits count the pieces.
  const __m512i piece = (__m512i)(distance * GeluTable::kPiecesPerUnit + 12582912.0f);
  auto coefficient = [&](int i) { return (Vec)_mm512_permutexvar_ps(piece, _mm512_loadu_ps(table.coefficient[i])); };
#else
  const Vec distance = at_most(magnitude(x), GeluTable::kFar);
  const Ints piece = __builtin_convertvector(distance * GeluTable::kPiecesPerUnit + 0.5f, Ints);
  auto coefficient = [&](int i) {
    Vec value;
    for (int lane = 0; lane < kLanes; lane++) value[lane] = table.coefficient[i][piece[lane] & (GeluTable::kPieces - 1)];
    return value;
  };
#endif
  const Vec tail = coefficient(0) + distance * (coefficient(1) + distance * (coefficient(2) + distance * coefficient(3)));
  return at_least(x, 0.0f) - distance * tail;
}

template <Activation kActivation>
INLINE Vec activate(Vec x) {
  if (kActivation == Activation::relu) return at_least(x, 0.0f);
  if (kActivation == Activation::gelu) return gelu_rough(x, mambavision::kGeluExactTable);
  if (kActivation == Activation::gelu_tanh) return gelu_rough(x, mambavision::kGeluTanhTable);
  return x;
}

enum class Extra { none, scale, residual };

template <Activation activation, Extra extra>
struct Kind {
  static constexpr Activation kActivation = activation;
  static constexpr Extra kExtra = extra;
};

constexpr int kVectors = kPanelColumns / kLanes;

// Finishes a block row by row. kWhole: all columns count.
template <Activation kActivation, Extra kExtra, bool kWhole>
class RowByRow {
 public:
  __attribute__((always_inline)) explicit RowByRow(const WaitingBlock& w)
      : sums_(w.sums), rows_(*w.rows), scale_(w.finish.row_scale), residual_((const bfloat16*)w.finish.residual),
        out_((bfloat16*)w.finish.out), columns_(w.columns) {
    for (int i = 0; i < kVectors; i++) bias_[i] = w.finish.bias ? load(w.finish.bias + i * kLanes, live(i)) : Vec{};
  }

  __attribute__((always_inline)) void next() {
    if (at_ < rows_.count) one(at_++);
  }
  __attribute__((always_inline)) void rest() {
    while (at_ < rows_.count) one(at_++);
  }

 private:
  __attribute__((always_inline)) int live(int vector) const {
    const int64_t left = columns_ - vector * kLanes;
    return kWhole || left >= kLanes ? kLanes : left > 0 ? (int)left : 0;
  }

  __attribute__((always_inline)) Vec value(int64_t index, int vector) const {
    const int64_t row = rows_.row[index];
    const Vec sum = load(sums_ + row * kPanelColumns + vector * kLanes);
    const Vec biased = kExtra == Extra::scale ? sum * scale_[row] + bias_[vector] : sum + bias_[vector];
    const Vec result = activate<kActivation>(biased);
    if (kExtra != Extra::residual) return result;
    return result + load(residual_ + rows_.residual[index] + vector * kLanes, live(vector));
  }

  __attribute__((always_inline)) void one(int64_t index) const {
    bfloat16* to = out_ + rows_.out[index];
    for (int i = 0; i < kVectors; i += 2) {
      if (kWhole) {
        store(to + i * kLanes, value(index, i), value(index, i + 1));
      } else {
        if (live(i) > 0) store(to + i * kLanes, value(index, i), live(i));
        if (live(i + 1) > 0) store(to + (i + 1) * kLanes, value(index, i + 1), live(i + 1));
      }
    }
  }

  const float* sums_;
  const PanelRows& rows_;
  const float* scale_;
  const bfloat16* residual_;
  bfloat16* out_;
  int64_t columns_, at_ = 0;
  Vec bias_[kVectors];
};

struct Nothing {
  explicit Nothing(const WaitingBlock&) {}
  __attribute__((always_inline)) void next() {}
  __attribute__((always_inline)) void rest() {}
};

template <class Rows>
struct Type {
  using type = Rows;
};

// Calls with(Type<...>) for the class that finishes what waits.
template <class With>
INLINE void choose_rows(const WaitingBlock& w, const With& with) {
  auto as = [&](auto kind) {
    using Kind = decltype(kind);
    w.columns == kPanelColumns ? with(Type<RowByRow<Kind::kActivation, Kind::kExtra, true>>{})
                               : with(Type<RowByRow<Kind::kActivation, Kind::kExtra, false>>{});
  };
  if (w.finish.residual) return as(Kind<Activation::none, Extra::residual>{});
  if (w.finish.row_scale) return as(Kind<Activation::none, Extra::scale>{});
  switch (w.finish.activation) {
    case Activation::none: return as(Kind<Activation::none, Extra::none>{});
    case Activation::relu: return as(Kind<Activation::relu, Extra::none>{});
    case Activation::gelu: return as(Kind<Activation::gelu, Extra::none>{});
    case Activation::gelu_tanh: return as(Kind<Activation::gelu_tanh, Extra::none>{});
  }
}

template <class Rows>
void finish_rows(const WaitingBlock& waiting) {
  Rows rows(waiting);
  rows.rest();
}

void finish(const WaitingBlock& waiting) {
  choose_rows(waiting, [&](auto type) { finish_rows<typename decltype(type)::type>(waiting); });
}

#if defined(HAS_TILES)

template <class Rows>
TILES void multiply_while(const PanelProduct& p, const WaitingBlock& waiting) {
  Rows rows(waiting);
  const int64_t tile_rows = p.rows / 2;
  const Factors factors = {p.A, p.parts, (const char*)p.B, 2 * p.lda, 2 * p.lda * tile_rows, 4 * p.ldb,
                           mambavision::kTileInner, p.inner / mambavision::kTileInner};
  const Sums to = {(char*)p.sums, 4 * p.stride, 4 * p.stride * tile_rows};
  auto next = [&]() __attribute__((always_inline)) { rows.next(); };
  p.columns > kPanelColumns / 2 ? multiply_tiles<2, 2>(factors, to, p.accumulate, next)
                                : multiply_tiles<2, 1>(factors, to, p.accumulate, next);
  rows.rest();
}

void multiply(const PanelProduct& product, const WaitingBlock* waiting) {
  if (waiting == nullptr) return multiply_while<Nothing>(product, {});
  choose_rows(*waiting, [&](auto type) { multiply_while<typename decltype(type)::type>(product, *waiting); });
}

#else

constexpr void (*multiply)(const PanelProduct&, const WaitingBlock*) = nullptr;  // nothing has matrix units then

#endif

}  // namespace

namespace mambavision {

extern const PanelKernels ISA_SYMBOL(panel_kernels);
const PanelKernels ISA_SYMBOL(panel_kernels) = {multiply, finish};

}  // namespace mambavision
