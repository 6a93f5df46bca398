// The selective scan's forward, for one instruction set, and how fast its exponential is.
#include "scan_kernel.h"

#include "scan_tile.h"

namespace {

// States handled at once: as many as the registers hold along with their decays.
constexpr int kForwardGroup = kLanes == 16 ? 8 : 4;

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

void forward(const ScanProblem& p, int64_t batch, Range blocks) {
  p.channels_are_bfloat16 ? forward_range<bfloat16>(p, batch, blocks) : forward_range<float>(p, batch, blocks);
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

const mambavision::ScanKernels mambavision::ISA_SYMBOL(scan_kernels) = {kLanes, forward, exponentials};
