#include "matrix_units.h"

#include <c10/util/Exception.h>

#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define HAS_TILES
#endif

#if defined(HAS_TILES)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>

#define TILES __attribute__((target("amx-tile,amx-bf16")))
#define INLINE __attribute__((always_inline)) inline

namespace mambavision {
namespace {

using c10::BFloat16;

constexpr int64_t kRows = 16, kColumns = 16;  // of a tile of sums

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 from A, 6 and 7 from B.
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

struct Sums {
  char* data;
  int64_t bytes, down;  // from row to row, from tile to tile
};

template <int kDown, int kAcross>
TILES INLINE void begin(const Sums& s, bool accumulate) {
  if (accumulate) {
    _tile_loadd(0, s.data, s.bytes);
    if constexpr (kAcross > 1) _tile_loadd(1, s.data + 64, s.bytes);
    if constexpr (kDown > 1) _tile_loadd(2, s.data + s.down, s.bytes);
    if constexpr (kDown > 1 && kAcross > 1) _tile_loadd(3, s.data + s.down + 64, s.bytes);
  } else {
    _tile_zero(0);
    if constexpr (kAcross > 1) _tile_zero(1);
    if constexpr (kDown > 1) _tile_zero(2);
    if constexpr (kDown > 1 && kAcross > 1) _tile_zero(3);
  }
}

template <int kDown, int kAcross>
TILES INLINE void end(const Sums& s) {
  _tile_stored(0, s.data, s.bytes);
  if constexpr (kAcross > 1) _tile_stored(1, s.data + 64, s.bytes);
  if constexpr (kDown > 1) _tile_stored(2, s.data + s.down, s.bytes);
  if constexpr (kDown > 1 && kAcross > 1) _tile_stored(3, s.data + s.down + 64, s.bytes);
}

struct Factors {
  const BFloat16* const* A;  // one for each part
  int64_t parts;
  const char* B;
  int64_t A_bytes, A_down, B_bytes;  // from row to row, from tile to tile, from pair to pair
  int64_t depth, steps;              // inner elements of a step, at most kTileInner; steps of a part
};

// By reference: copied, the structures would be read in larger pieces than they were written, which waits for all stores.
template <int kDown, int kAcross>
TILES void multiply_tiles(const Factors& f, const Sums& sums, bool accumulate) {
  begin<kDown, kAcross>(sums, accumulate);
  const char* B = f.B;
  for (int64_t part = 0; part < f.parts; part++) {
    const char* A = reinterpret_cast<const char*>(f.A[part]);
    for (int64_t step = 0; step < f.steps; step++, A += 2 * f.depth, B += f.depth / 2 * f.B_bytes) {
      _tile_loadd(6, B, f.B_bytes);
      _tile_loadd(4, A, f.A_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kAcross > 1) {
        _tile_loadd(7, B + 64, f.B_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kDown > 1) {
        _tile_loadd(5, A + f.A_down, f.A_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kAcross > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  end<kDown, kAcross>(sums);
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

void MatrixUnits::multiply_panel(int64_t rows, int64_t columns, int64_t inner, const BFloat16* const* A, int64_t parts,
                                 int64_t lda, const BFloat16* B, int64_t ldb, float* sums, int64_t stride,
                                 bool accumulate) {
  const int64_t tile_rows = rows / 2;
  shape(tile_rows, kColumns, kTileInner);
  const Factors factors = {A, parts, reinterpret_cast<const char*>(B), 2 * lda, 2 * lda * tile_rows, 4 * ldb, kTileInner,
                           inner / kTileInner};
  const Sums to = {reinterpret_cast<char*>(sums), 4 * stride, 4 * stride * tile_rows};
  columns > kColumns ? multiply_tiles<2, 2>(factors, to, accumulate) : multiply_tiles<2, 1>(factors, to, accumulate);
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
            const BFloat16* from = A + at_row * lda + k.begin;
            const Factors factors = {&from, 1, reinterpret_cast<const char*>(B + k.begin * ldb + 2 * at_column),
                                     2 * lda, 2 * lda * row.size, 4 * ldb, k.size, k.count};
            const Sums to = {reinterpret_cast<char*>(sums + at_row * stride + at_column), 4 * stride, 4 * stride * row.size};
            const bool high = row.count - r > 1, wide = column.count - c > 1, add_to = accumulate || k.begin > 0;
            if (wide && high) multiply_tiles<2, 2>(factors, to, add_to);
            else if (wide) multiply_tiles<1, 2>(factors, to, add_to);
            else if (high) multiply_tiles<2, 1>(factors, to, add_to);
            else multiply_tiles<1, 1>(factors, to, add_to);
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
void MatrixUnits::multiply_panel(int64_t, int64_t, int64_t, const c10::BFloat16*, int64_t, const c10::BFloat16*, int64_t,
                                 float*, int64_t, bool) {}

}  // namespace mambavision

#endif
