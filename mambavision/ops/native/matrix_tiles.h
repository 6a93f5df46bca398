// The loop that multiplies on the matrix units. Everything has internal linkage and no C++ standard header is included: see
// isa.h for why.
#pragma once

#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define HAS_TILES

#include <immintrin.h>

#define TILES __attribute__((target("amx-tile,amx-bf16")))
#define INLINE_TILES TILES __attribute__((always_inline)) inline

namespace {

struct Sums {
  char* data;
  int64_t bytes, down;  // from row to row, from tile to tile
};

struct Factors {
  const void* const* A;  // one for each part
  int64_t parts;
  const char* B;
  int64_t A_bytes, A_down, B_bytes;  // from row to row, from tile to tile, from pair to pair
  int64_t depth, steps;              // inner elements of a step, at most 32; steps of a part
};

// Tiles 0 to 3 are sums, 4 and 5 from A, 6 and 7 from B.
template <int kDown, int kAcross>
INLINE_TILES void begin_sums(const Sums& s, bool accumulate) {
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
INLINE_TILES void end_sums(const Sums& s) {
  _tile_stored(0, s.data, s.bytes);
  if constexpr (kAcross > 1) _tile_stored(1, s.data + 64, s.bytes);
  if constexpr (kDown > 1) _tile_stored(2, s.data + s.down, s.bytes);
  if constexpr (kDown > 1 && kAcross > 1) _tile_stored(3, s.data + s.down + 64, s.bytes);
}

// Calls meanwhile() after each instruction of the matrix units: what stands there runs beside it. The structures come by
// reference: copied, they would be read in larger pieces than they were written, which waits for all stores.
template <int kDown, int kAcross, class Meanwhile>
INLINE_TILES void multiply_tiles(const Factors& f, const Sums& sums, bool accumulate, const Meanwhile& meanwhile) {
  begin_sums<kDown, kAcross>(sums, accumulate);
  const char* B = f.B;
  for (int64_t part = 0; part < f.parts; part++) {
    const char* A = static_cast<const char*>(f.A[part]);
    for (int64_t step = 0; step < f.steps; step++, A += 2 * f.depth, B += f.depth / 2 * f.B_bytes) {
      _tile_loadd(6, B, f.B_bytes);
      _tile_loadd(4, A, f.A_bytes);
      _tile_dpbf16ps(0, 4, 6);
      meanwhile();
      if constexpr (kAcross > 1) {
        _tile_loadd(7, B + 64, f.B_bytes);
        _tile_dpbf16ps(1, 4, 7);
        meanwhile();
      }
      if constexpr (kDown > 1) {
        _tile_loadd(5, A + f.A_down, f.A_bytes);
        _tile_dpbf16ps(2, 5, 6);
        meanwhile();
        if constexpr (kAcross > 1) {
          _tile_dpbf16ps(3, 5, 7);
          meanwhile();
        }
      }
    }
  }
  end_sums<kDown, kAcross>(sums);
}

}  // namespace

#endif
