// The selective scan, forward and backward, for one instruction set. A lane is a channel; a block is one vector of them.
#include "scan_kernel.h"

#include <stdlib.h>

#include "isa.h"
#include "simd.h"

namespace {

using mambavision::kStatePad;
using mambavision::kTileTokens;
using mambavision::Range;
using mambavision::Rows;
using mambavision::ScanProblem;

// States handled at once: as many as the registers hold along with their decays and gradients.
constexpr int kForwardGroup = kLanes == 16 ? 8 : 4;
constexpr int kBackwardGroup = 4;  // more would spill, or fill the scheduler with one token's chains of additions

struct Tile {
  int64_t first;
  int tokens;
};

Tile tile_at(const ScanProblem& p, int64_t index) {  // tiles of equal length, to one token
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
void stage_states(const ScanProblem& p, int64_t batch, Tile tile, float* BC) {
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

// Advances kForwardGroup states over a tile and adds their part of the output.
template <bool kBounded>
INLINE void advance(int tokens, int64_t states, int64_t channels, const Vec* dt, const Vec* x, const float* BC,
                    const float* A_log2e, Vec* state, Vec* y, const Ahead<3>& ahead) {
  Vec A[kForwardGroup], h[kForwardGroup];
  for (int n = 0; n < kForwardGroup; n++) A[n] = load(A_log2e + n * channels), h[n] = state[n];
  for (int t = 0; t < tokens; t++, BC += 2 * states) {
    Vec sum = y[t];
    ahead.fetch(t);
#pragma GCC unroll 8
    for (int n = 0; n < kForwardGroup; n++) {
      h[n] = decay<kBounded>(dt[t], A[n]) * h[n] + x[t] * BC[n];
      sum += h[n] * BC[states + n];
    }
    y[t] = sum;
  }
  for (int n = 0; n < kForwardGroup; n++) state[n] = h[n];
}

template <class T>
void forward_block(const ScanProblem& p, int64_t batch, int64_t tile_index, Tile tile, int64_t channel, const float* BC,
                   Vec* state) {
  const int live = (int)(p.channels - channel);
  const int64_t N = p.padded_states;
  const Vec D = load(p.D + channel), bias = load(p.bias + channel);
  Vec dt[kTileTokens], x[kTileTokens], y[kTileTokens], largest_dt = {};
  if (p.checkpoints != nullptr && tile_index > 0)
    for (int64_t n = 0; n < N; n++) store(checkpoint(p, batch, tile_index, channel) + n * p.padded_channels, state[n]);
  const T *u_row = row<T>(p.u, batch, tile.first) + channel, *delta_row = row<T>(p.delta, batch, tile.first) + channel;
  T* y_row = row<T>(p.y, batch, tile.first) + channel;
  for (int t = 0; t < tile.tokens; t++) {
    const Vec u = load(u_row + t * p.u.token_stride, live);
    const Vec raw = load(delta_row + t * p.delta.token_stride, live) + bias;
    dt[t] = softplus(raw, exp_minus_magnitude(raw));
    x[t] = dt[t] * u;
    y[t] = D * u;
    largest_dt = dt[t] <= largest_dt ? largest_dt : dt[t];  // takes a NaN, so that decays_bounded sees it
  }
  const bool bounded = decays_bounded(p, channel, largest_dt);
  const int64_t size = sizeof(T);
  const Ahead<3> ahead = {{(const char*)(u_row + tile.tokens * p.u.token_stride),
                           (const char*)(delta_row + tile.tokens * p.delta.token_stride),
                           (const char*)(y_row + tile.tokens * p.y.token_stride)},
                          {p.u.token_stride * size, p.delta.token_stride * size, p.y.token_stride * size}};
  for (int64_t n = 0; n < N; n += kForwardGroup) {
    const float* A = p.A_log2e + n * p.padded_channels + channel;
    if (bounded)
      advance<true>(tile.tokens, N, p.padded_channels, dt, x, BC + n, A, state + n, y, ahead);
    else
      advance<false>(tile.tokens, N, p.padded_channels, dt, x, BC + n, A, state + n, y, ahead);
  }
  for (int t = 0; t < tile.tokens; t++) store(y_row + t * p.y.token_stride, y[t], live);
}

template <class T>
void forward_range(const ScanProblem& p, int64_t batch, Range blocks) {
  const int64_t N = p.padded_states;
  Scratch states((blocks.end - blocks.begin) * N), staged(kTileTokens * 2 * N * sizeof(float) / sizeof(Vec));
  float* BC = (float*)staged.get();
  for (int64_t index = 0; index < p.tiles; index++) {
    const Tile tile = tile_at(p, index);
    stage_states(p, batch, tile, BC);
    Vec* state = states.get();
    for (int64_t block = blocks.begin; block < blocks.end; block++, state += N)
      forward_block<T>(p, batch, index, tile, block * kLanes, BC, state);
  }
}

// What the backward keeps of one block's tile, in the first-level cache.
struct BackwardTile {
  Vec dt[kTileTokens], slope[kTileTokens], u[kTileTokens], x[kTileTokens], dy[kTileTokens];
  Vec ddt[kTileTokens], dx[kTileTokens];  // gradients of dt through the decay, and of x = dt u
  Vec decay[kTileTokens][kBackwardGroup], state[kTileTokens + 1][kBackwardGroup];  // state[t] is the one before token t
  Vec A[kBackwardGroup];
};

// Running sums of one block: of its parameters' gradients, and per state what comes back through time.
struct BlockSums {
  Vec *dD, *dbias, *dA, *adjoint;
};

// Returns whether the tile's decays are bounded.
template <class T>
INLINE bool load_tile(const ScanProblem& p, int64_t batch, Tile tile, int64_t channel, BackwardTile& s, Vec* dD) {
  const int live = (int)(p.channels - channel);
  const Vec bias = load(p.bias + channel);
  const T *u_row = row<T>(p.u, batch, tile.first) + channel, *delta_row = row<T>(p.delta, batch, tile.first) + channel;
  const T* dy_row = row<T>(p.dy, batch, tile.first) + channel;
  Vec largest_dt = {}, dD_sum = *dD;
  for (int t = 0; t < tile.tokens; t++) {
    const Vec raw = load(delta_row + t * p.delta.token_stride, live) + bias;
    const Vec z = exp_minus_magnitude(raw);
    const Vec dt = softplus(raw, z), u = load(u_row + t * p.u.token_stride, live);
    const Vec dy = load(dy_row + t * p.dy.token_stride, live);
    s.dt[t] = dt, s.u[t] = u, s.dy[t] = dy;
    s.slope[t] = sigmoid(raw, z);
    s.x[t] = dt * u;
    s.ddt[t] = s.dx[t] = Vec{};
    dD_sum += dy * u;
    largest_dt = dt <= largest_dt ? largest_dt : dt;
  }
  *dD = dD_sum;
  return decays_bounded(p, channel, largest_dt);
}

template <class T>
INLINE void store_tile(const ScanProblem& p, int64_t batch, Tile tile, int64_t channel, const BackwardTile& s,
                       Vec* dbias) {
  const int live = (int)(p.channels - channel);
  const Vec D = load(p.D + channel);
  T *du_row = row<T>(p.du, batch, tile.first) + channel, *ddelta_row = row<T>(p.ddelta, batch, tile.first) + channel;
  Vec dbias_sum = *dbias;
  for (int t = 0; t < tile.tokens; t++) {
    const Vec ddelta = (s.ddt[t] * kLn2 + s.dx[t] * s.u[t]) * s.slope[t];
    dbias_sum += ddelta;
    store(du_row + t * p.du.token_stride, s.dx[t] * s.dt[t] + s.dy[t] * D, live);
    store(ddelta_row + t * p.ddelta.token_stride, ddelta, live);
  }
  *dbias = dbias_sum;
}

// Recomputes decays and states of a group over the tile. dB_dC[token][2 N] collects, over the blocks, the gradients of B
// and C still spread over the lanes: those of C here, where arithmetic leaves room for memory traffic.
template <bool kBounded>
INLINE void recompute(BackwardTile& s, int tokens, int64_t states, const float* BC, Vec* dB_dC,
                      const Ahead<3>& ahead) {
  Vec A[kBackwardGroup], h[kBackwardGroup];
  for (int n = 0; n < kBackwardGroup; n++) A[n] = s.A[n], h[n] = s.state[0][n];
  for (int t = 0; t < tokens; t++, BC += 2 * states) {
    const Vec dt = s.dt[t], x = s.x[t], dy = s.dy[t];
    ahead.fetch(t);
    Vec* dC = dB_dC + t * 2 * states + states;
#pragma GCC unroll 8
    for (int n = 0; n < kBackwardGroup; n++) {
      const Vec a = decay<kBounded>(dt, A[n]);
      h[n] = a * h[n] + x * BC[n];
      s.decay[t][n] = a;
      s.state[t + 1][n] = h[n];
      dC[n] += dy * h[n];
    }
  }
}

// Walks a group of states back over the tile. The adjoint is dL/dh at the tile's end on entry, before its first token on
// return.
INLINE void reverse(BackwardTile& s, int tokens, int64_t states, const float* BC, Vec* adjoint, Vec* dA, Vec* dB_dC,
                    const Ahead<2>& ahead) {
  Vec g[kBackwardGroup], dA_sum[kBackwardGroup];
  for (int n = 0; n < kBackwardGroup; n++) g[n] = adjoint[n], dA_sum[n] = dA[n];
  for (int t = tokens - 1; t >= 0; t--) {
    const float *B = BC + t * 2 * states, *C = B + states;
    Vec* dB = dB_dC + t * 2 * states;
    ahead.fetch(t);
    const Vec dy = s.dy[t], x = s.x[t], dt = s.dt[t];
    Vec ddt = s.ddt[t], dx = s.dx[t];
#pragma GCC unroll 8
    for (int n = 0; n < kBackwardGroup; n++) {
      const Vec dh = g[n] + dy * C[n];
      dB[n] += dh * x;
      dx += dh * B[n];
      g[n] = dh * s.decay[t][n];
      const Vec dexponent = g[n] * s.state[t][n];
      dA_sum[n] += dexponent * dt;
      ddt += dexponent * s.A[n];
    }
    s.ddt[t] = ddt;
    s.dx[t] = dx;
  }
  for (int n = 0; n < kBackwardGroup; n++) adjoint[n] = g[n], dA[n] = dA_sum[n];
}

template <class T>
void backward_block(const ScanProblem& p, int64_t batch, int64_t tile_index, Tile tile, int64_t channel,
                    const float* BC, BlockSums sums, Vec* dB_dC) {
  BackwardTile s;
  const bool bounded = load_tile<T>(p, batch, tile, channel, s, sums.dD);
  auto before = [&](const Rows& rows) { return (const char*)(row<T>(rows, batch, tile.first - tile.tokens) + channel); };
  const int64_t size = sizeof(T);
  const Ahead<3> inputs = {{before(p.u), before(p.delta), before(p.dy)},
                           {p.u.token_stride * size, p.delta.token_stride * size, p.dy.token_stride * size}};
  const Ahead<2> outputs = {{before(p.du), before(p.ddelta)},
                            {p.du.token_stride * size, p.ddelta.token_stride * size}};
  for (int64_t first = 0; first < p.padded_states; first += kBackwardGroup) {
    const int64_t at = first * p.padded_channels + channel;
    for (int n = 0; n < kBackwardGroup; n++) {
      s.A[n] = load(p.A_log2e + at + n * p.padded_channels);
      s.state[0][n] = Vec{};
      if (tile_index == 0) continue;
      const float* kept = checkpoint(p, batch, tile_index, at) + n * p.padded_channels;
      s.state[0][n] = load(kept);
      prefetch(kept - p.padded_states * p.padded_channels);
    }
    if (bounded)
      recompute<true>(s, tile.tokens, p.padded_states, BC + first, dB_dC + first, inputs);
    else
      recompute<false>(s, tile.tokens, p.padded_states, BC + first, dB_dC + first, inputs);
    reverse(s, tile.tokens, p.padded_states, BC + first, sums.adjoint + first, sums.dA + first, dB_dC + first, outputs);
  }
  store_tile<T>(p, batch, tile, channel, s, sums.dbias);
}

template <class T>
void backward_range(const ScanProblem& p, int64_t slot, Range batches, int64_t group, Range blocks) {
  const int64_t N = p.padded_states, count = blocks.end - blocks.begin;
  Scratch adjoints(count * N), dA(count * N), dD_dbias(count * 2), dB_dC(kTileTokens * 2 * N);
  Scratch staged(kTileTokens * 2 * N * sizeof(float) / sizeof(Vec));
  float* BC = (float*)staged.get();
  auto sums = [&](int64_t i) {
    return BlockSums{dD_dbias.get() + i * 2, dD_dbias.get() + i * 2 + 1, dA.get() + i * N, adjoints.get() + i * N};
  };
  for (int64_t batch = batches.begin; batch < batches.end; batch++) {
    memset((void*)adjoints.get(), 0, count * N * sizeof(Vec));
    for (int64_t index = p.tiles - 1; index >= 0; index--) {
      const Tile tile = tile_at(p, index);
      stage_states(p, batch, tile, BC);
      memset((void*)dB_dC.get(), 0, tile.tokens * 2 * N * sizeof(Vec));
      for (int64_t i = 0; i < count; i++)
        backward_block<T>(p, batch, index, tile, (blocks.begin + i) * kLanes, BC, sums(i), dB_dC.get());
      float* totals = p.dB_dC + ((group * p.batch + batch) * p.tokens + tile.first) * 2 * N;
      for (int64_t k = 0; k < tile.tokens * 2 * N; k += 16) sum_lanes_of_16(dB_dC.get() + k, totals + k);
    }
  }
  for (int64_t i = 0; i < count; i++) {
    float* to = p.dparameters + slot * (N + 2) * p.padded_channels + (blocks.begin + i) * kLanes;
    for (int64_t n = 0; n < N; n++) store(to + n * p.padded_channels, dA.get()[i * N + n]);
    for (int64_t n = 0; n < 2; n++) store(to + (N + n) * p.padded_channels, dD_dbias.get()[i * 2 + n]);
  }
}

void forward(const ScanProblem& p, int64_t batch, Range blocks) {
  p.channels_are_bfloat16 ? forward_range<bfloat16>(p, batch, blocks) : forward_range<float>(p, batch, blocks);
}

void backward(const ScanProblem& p, int64_t slot, Range batches, int64_t group, Range blocks) {
  p.channels_are_bfloat16 ? backward_range<bfloat16>(p, slot, batches, group, blocks)
                          : backward_range<float>(p, slot, batches, group, blocks);
}

int64_t exponentials(int64_t at_least) {
  constexpr int kVectors = 64, kSums = 8;  // enough independent ones to be bound by throughput
  Vec exponents[kVectors], sums[kSums] = {};
  for (int i = 0; i < kVectors; i++) exponents[i] = splat(0.01f * i);
  int64_t done = 0;
  for (; done < at_least; done += kVectors * kLanes) {
    __asm__ volatile("" ::"r"(exponents) : "memory");  // each round counts as new input
    for (int i = 0; i < kVectors; i += kSums)
      for (int k = 0; k < kSums; k++) sums[k] += exp2_product_bounded(exponents[i + k], splat(-kLog2E));
  }
  volatile float used = sum_lanes(sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7]);
  (void)used;
  return done;
}

}  // namespace

const mambavision::ScanKernels mambavision::ISA_SYMBOL(scan_kernels) = {kLanes, forward, backward, exponentials};
