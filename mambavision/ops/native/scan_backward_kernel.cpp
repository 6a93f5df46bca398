// The selective scan's backward, for one instruction set.
#include "scan_kernel.h"
#include "scan_tile.h"

namespace {

// States handled at once. More would spill, or fill the scheduler with one token's chains of additions.
constexpr int kBackwardGroup = 4;

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
    dD_sum += dy * u;
    largest_dt = dt <= largest_dt ? largest_dt : dt;
  }
  *dD = dD_sum;
  return decays_bounded(p, channel, largest_dt);
}

// A tile's gradients of u and delta, made of a token's sums once these have all states in them.
template <class T>
struct TokenGradients {
  T *du_row, *ddelta_row;
  int64_t du_stride, ddelta_stride;
  int live;
  Vec D, dbias;

  __attribute__((always_inline)) void finish(const BackwardTile& s, int t, Vec ddt, Vec dx) {
    const Vec ddelta = (ddt * kLn2 + dx * s.u[t]) * s.slope[t];
    dbias += ddelta;
    store(du_row + t * du_stride, dx * s.dt[t] + s.dy[t] * D, live);
    store(ddelta_row + t * ddelta_stride, ddelta, live);
  }
};

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
// return. The first group begins a token's sums, the last finishes them.
template <bool kFirst, bool kLast, class T>
INLINE void reverse(BackwardTile& s, int tokens, int64_t states, const float* BC, BlockSums sums, Vec* dB_dC,
                    const Ahead<2>& ahead, TokenGradients<T>& gradients) {
  Vec g[kBackwardGroup], dA_sum[kBackwardGroup];
  for (int n = 0; n < kBackwardGroup; n++) g[n] = sums.adjoint[n], dA_sum[n] = sums.dA[n];
  for (int t = tokens - 1; t >= 0; t--) {
    const float *B = BC + t * 2 * states, *C = B + states;
    Vec* dB = dB_dC + t * 2 * states;
    ahead.fetch(t);
    const Vec dy = s.dy[t], x = s.x[t], dt = s.dt[t];
    Vec ddt = kFirst ? Vec{} : s.ddt[t], dx = kFirst ? Vec{} : s.dx[t];
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
    if constexpr (kLast)
      gradients.finish(s, t, ddt, dx);
    else
      s.ddt[t] = ddt, s.dx[t] = dx;
  }
  for (int n = 0; n < kBackwardGroup; n++) sums.adjoint[n] = g[n], sums.dA[n] = dA_sum[n];
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
  TokenGradients<T> gradients = {row<T>(p.du, batch, tile.first) + channel,
                                 row<T>(p.ddelta, batch, tile.first) + channel,
                                 p.du.token_stride,
                                 p.ddelta.token_stride,
                                 (int)(p.channels - channel),
                                 load(p.D + channel),
                                 *sums.dbias};
  static_assert(kStatePad > kBackwardGroup, "the first group is not the last");
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
    auto walk_back = [&]<bool kFirst, bool kLast>() {
      const BlockSums group = {sums.dD, sums.dbias, sums.dA + first, sums.adjoint + first};
      reverse<kFirst, kLast>(s, tile.tokens, p.padded_states, BC + first, group, dB_dC + first, outputs, gradients);
    };
    if (first == 0)
      walk_back.template operator()<true, false>();
    else if (first + kBackwardGroup < p.padded_states)
      walk_back.template operator()<false, false>();
    else
      walk_back.template operator()<false, true>();
  }
  *sums.dbias = gradients.dbias;
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

void backward(const ScanProblem& p, int64_t slot, Range batches, int64_t group, Range blocks) {
  p.channels_are_bfloat16 ? backward_range<bfloat16>(p, slot, batches, group, blocks)
                          : backward_range<float>(p, slot, batches, group, blocks);
}

}  // namespace

const mambavision::ScanBackwardKernel mambavision::ISA_SYMBOL(scan_backward_kernel) = {backward};
