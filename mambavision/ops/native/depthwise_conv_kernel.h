// What the token convolution's kernels and the torch operators that call them agree on.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace mambavision {

constexpr int kTaps = 3;

// A (batch, token, channel) array of float32 or bfloat16 whose channels are contiguous.
struct TokenRows {
  void* data;
  int64_t batch_stride, token_stride;  // in elements
};

// a_t = sum_k w_k x_{t + first_tap + k}, zeros outside the sequence;  y_t = silu(a_t), or a_t itself.
struct TokenConv {
  int64_t tokens, channels;
  int first_tap;  // -1: the taps lie around the token; -2: none lies after it (causal)
  bool silu, bfloat16;
  const float* taps;     // (kTaps, tap_stride), padded with zeros to whole vectors
  int64_t tap_stride;    // in floats, a multiple of the widest vector
  TokenRows x, y;        // forward
  TokenRows dy, dx;      // backward
};

struct TokenRange {
  int64_t begin, end;
};

struct TokenConvKernels {
  void (*forward)(const TokenConv& conv, int64_t batch, TokenRange tokens);
  // dx of these tokens; adds their share of the taps' gradient to dtaps (kTaps, tap_stride).
  void (*backward)(const TokenConv& conv, int64_t batch, TokenRange tokens, float* dtaps);
};

ISA_DECLARE(TokenConvKernels, token_conv_kernels);

}  // namespace mambavision
