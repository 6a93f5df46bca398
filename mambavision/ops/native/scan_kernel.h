// What the selective scan's kernels and the torch operators that call them agree on.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

// Tokens are worked on in tiles small enough for a tile's states to stay in the first-level cache; the forward keeps the
// state before each tile, the backward recomputes within the tile.
constexpr int kTileTokens = 16;
constexpr int kStatePad = 8;     // states are padded to a multiple of this; a padded state stays zero
constexpr int kChannelPad = 16;  // per-channel parameters are padded to a multiple of this, the widest vector

// A (batch, token, ...) array of float32 or bfloat16 whose last dimension is contiguous.
struct Rows {
  void* data;
  int64_t batch_stride, token_stride;  // in elements
};

// h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t;  y_t = C_t h_t + D u_t;  dt = softplus(delta + bias)   (Mamba, algorithm 2)
struct ScanProblem {
  int64_t batch, tokens, channels, states;
  int64_t tiles, padded_states, padded_channels;
  bool channels_are_bfloat16;  // u, delta, y and their gradients
  bool states_are_bfloat16;    // B, C
  Rows u, delta, B, C;
  // Padded, per channel: A log2(e) and its largest magnitude over the states, D and bias (zeros where not given).
  const float *A_log2e, *A_magnitude;  // (padded_states, padded_channels), (padded_channels)
  const float *D, *bias;               // (padded_channels)
  float* checkpoints;                  // (batch, tiles - 1, padded_states, padded_channels), or null

  Rows y;  // forward's output

  // backward: the gradient of y; gradients per token; partial sums that the caller adds up in a fixed order.
  Rows dy, du, ddelta;
  float* dB_dC;        // (channel groups, batch, tokens, 2 padded_states)
  float* dparameters;  // (batch slots, padded_states + 2, padded_channels): dA, dD, dbias
};

struct Range {
  int64_t begin, end;
};

struct ScanKernels {
  int lanes;  // channels in a block
  void (*forward)(const ScanProblem&, int64_t batch, Range blocks);
  int64_t (*exponentials)(int64_t at_least);  // evaluates that many and returns how many: the bench's bound
};

struct ScanBackwardKernel {
  void (*run)(const ScanProblem&, int64_t slot, Range batches, int64_t group, Range blocks);
};

ISA_DECLARE(ScanKernels, scan_kernels);
ISA_DECLARE(ScanBackwardKernel, scan_backward_kernel);

}  // namespace mambavision
