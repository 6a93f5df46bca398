#include "matrix_units.h"

#include <c10/util/Exception.h>

#include "matrix_tiles.h"
#include "panel_kernel.h"

#if defined(HAS_TILES)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>

namespace mambavision {
namespace {

using c10::BFloat16;

constexpr int64_t kRows = 16, kColumns = 16;  // of a tile of sums

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

TILES void shape_tiles(int64_t rows, int64_t columns, int64_t inner) {
  TileShapes shapes;
  for (int i = 0; i < 8; i++) {
    shapes.rows[i] = static_cast<uint8_t>(i < 6 ? rows : inner / 2);
    shapes.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 2 * inner : 4 * columns);
  }
  __asm__ volatile("" ::"r"(&shapes) : "memory");  // the intrinsic does not say that it reads all of them
  _tile_loadconfig(&shapes);
}

TILES void release_tiles() { _tile_release(); }

template <int kDown, int kAcross>
TILES void multiply_region(const Factors& factors, const Sums& sums, bool accumulate) {
  multiply_tiles<kDown, kAcross>(factors, sums, accumulate, []() __attribute__((always_inline)) {});
}

struct Part {
  int64_t begin, count, size;  // tiles
};
using Cut = std::array<Part, 2>;

Cut cut(int64_t length, int64_t tile) {
  const int64_t whole = length / tile * tile;
  return {{{0, whole / tile, tile}, {whole, length > whole, length - whole}}};
}

// Shorter steps where they leave nothing over: 40 is twice 20.
Cut cut_evenly(int64_t inner) {
  const int64_t steps = (inner + kTileInner - 1) / kTileInner, depth = inner / steps;
  return depth * steps == inner && depth % 2 == 0 ? Cut{{{0, steps, depth}, {}}} : cut(inner, kTileInner);
}

bool supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of edx
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM), XFEATURE_XTILEDATA
  return (d & kBFloat16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool matrix_units_available() {
  static const bool available = supported();
  return available;
}

MatrixUnits::MatrixUnits() { TORCH_INTERNAL_ASSERT(matrix_units_available()); }

MatrixUnits::~MatrixUnits() { release_tiles(); }

void MatrixUnits::shape(int64_t rows, int64_t columns, int64_t inner) {
  if (rows == rows_ && columns == columns_ && inner == inner_) return;
  shape_tiles(rows, columns, inner);
  rows_ = rows, columns_ = columns, inner_ = inner;
}

void MatrixUnits::multiply_panel(const PanelProduct& product, const WaitingBlock* waiting) {
  shape(product.rows / 2, kColumns, kTileInner);
  ISA_TABLE(panel_kernels).multiply(product, waiting);
}

void MatrixUnits::multiply(int64_t rows, int64_t columns, int64_t inner, const BFloat16* A, int64_t lda,
                           const BFloat16* B, int64_t ldb, float* sums, int64_t stride, bool accumulate) {
  // Whole tiles and what is left over along each dimension: up to eight regions, each of tiles of one shape.
  const Cut down = cut(rows, kRows), across = cut(columns, kColumns), deep = cut_evenly(inner);
  for (const Part& k : deep)
    for (const Part& row : down)
      for (const Part& column : across) {
        if (row.count == 0 || column.count == 0 || k.count == 0) continue;
        shape(row.size, column.size, k.size);
        // Two columns of tiles of B stay in the first-level cache while the rows of A go by.
        for (int64_t c = 0; c < column.count; c += 2)
          for (int64_t r = 0; r < row.count; r += 2) {
            const int64_t at_row = row.begin + r * row.size, at_column = column.begin + c * column.size;
            const void* from = A + at_row * lda + k.begin;
            const Factors factors = {&from, 1, reinterpret_cast<const char*>(B + k.begin * ldb + 2 * at_column),
                                     2 * lda, 2 * lda * row.size, 4 * ldb, k.size, k.count};
            const Sums to = {reinterpret_cast<char*>(sums + at_row * stride + at_column), 4 * stride, 4 * stride * row.size};
            const bool high = row.count - r > 1, wide = column.count - c > 1, add_to = accumulate || k.begin > 0;
            if (wide && high) multiply_region<2, 2>(factors, to, add_to);
            else if (wide) multiply_region<1, 2>(factors, to, add_to);
            else if (high) multiply_region<2, 1>(factors, to, add_to);
            else multiply_region<1, 1>(factors, to, add_to);
          }
      }
}

}  // namespace mambavision

#else

namespace mambavision {

bool matrix_units_available() { return false; }
MatrixUnits::MatrixUnits() { TORCH_INTERNAL_ASSERT(false, "no matrix units"); }
MatrixUnits::~MatrixUnits() = default;
void MatrixUnits::multiply(int64_t, int64_t, int64_t, const c10::BFloat16*, int64_t, const c10::BFloat16*, int64_t, float*,
                           int64_t, bool) {}
void MatrixUnits::multiply_panel(const PanelProduct&, const WaitingBlock*) {}

}  // namespace mambavision

#endif
