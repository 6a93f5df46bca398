// What the scan's forward and backward kernels share, compiled for one instruction set. A lane is a channel; a block is one
// vector of them.
#pragma once

#include <stdlib.h>

#include "isa.h"
#include "scan_kernel.h"
#include "simd.h"

namespace {

using mambavision::kStatePad;
using mambavision::kTileTokens;
using mambavision::Range;
using mambavision::Rows;
using mambavision::ScanProblem;

struct Tile {
  int64_t first;
  int tokens;
};

INLINE Tile tile_at(const ScanProblem& p, int64_t index) {  // tiles of equal length, to one token
  const int64_t first = index * p.tokens / p.tiles;
  return {first, (int)((index + 1) * p.tokens / p.tiles - first)};
}

class Scratch {  // vectors on the heap, zeroed
 public:
  explicit Scratch(int64_t count) : vectors_((Vec*)aligned_alloc(64, (count * sizeof(Vec) + 63) / 64 * 64)) {
    if (vectors_ == nullptr) abort();
    memset((void*)vectors_, 0, count * sizeof(Vec));
  }
  ~Scratch() { free(vectors_); }
  Scratch(const Scratch&) = delete;
  Vec* get() { return vectors_; }

 private:
  Vec* vectors_;
};

template <class T>
INLINE T* row(const Rows& rows, int64_t batch, int64_t token) {
  return (T*)rows.data + batch * rows.batch_stride + token * rows.token_stride;
}

// Rows that the next tile will need, fetched token by token while this one computes: all at once they would wait for each
// other. The hardware's prefetcher does not follow the strides of a tile.
template <int kRows>
struct Ahead {
  const char* rows[kRows];
  int64_t bytes_per_token[kRows];

  __attribute__((always_inline)) void fetch(int token) const {
    for (int i = 0; i < kRows; i++) prefetch(rows[i] + token * bytes_per_token[i]);
  }
};

template <class T>
void stage_states(const ScanProblem& p, int64_t batch, Tile tile, float* BC) {
  for (int t = 0; t < tile.tokens; t++, BC += 2 * p.padded_states) {
    const T *B = row<T>(p.B, batch, tile.first + t), *C = row<T>(p.C, batch, tile.first + t);
    for (int64_t n = 0; n < p.states; n++) BC[n] = to_float(B[n]);
    for (int64_t n = 0; n < p.states; n++) BC[p.padded_states + n] = to_float(C[n]);
  }
}

// B and C of a tile's tokens as float32, side by side: BC[token][0..N) is B, BC[token][N..2N) is C, padding untouched.
INLINE void stage_states(const ScanProblem& p, int64_t batch, Tile tile, float* BC) {
  p.states_are_bfloat16 ? stage_states<bfloat16>(p, batch, tile, BC) : stage_states<float>(p, batch, tile, BC);
}

INLINE float* checkpoint(const ScanProblem& p, int64_t batch, int64_t tile, int64_t channel) {
  return p.checkpoints + (batch * (p.tiles - 1) + tile - 1) * p.padded_states * p.padded_channels + channel;
}

// The exponents dt * A of a tile need no clamping, which is nearly always so.
INLINE bool decays_bounded(const ScanProblem& p, int64_t channel, Vec largest_dt) {
  return all_below(largest_dt * load(p.A_magnitude + channel), kExponentLimit);
}

template <bool kBounded>
INLINE Vec decay(Vec dt, Vec A_log2e) {
  return kBounded ? exp2_product_bounded(dt, A_log2e) : exp2_product(dt, A_log2e);
}

}  // namespace
