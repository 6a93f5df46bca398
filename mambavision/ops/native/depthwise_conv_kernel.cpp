// The mixer's short depthwise convolution over tokens, forward and backward, for one instruction set.
// A lane is a channel. A few vectors of channels walk along the tokens with taps and window in registers, so that every
// element is read once and written once.
#include "depthwise_conv_kernel.h"

#include "isa.h"
#include "simd.h"

namespace {

using mambavision::kTaps;
using mambavision::TokenConv;
using mambavision::TokenRange;
using mambavision::TokenRows;

constexpr int kWidth = kLanes == 16 ? 2 : 1;  // vectors side by side: what the registers hold
constexpr int64_t kBlockChannels = kWidth * kLanes;

template <class T>
struct Channels {  // one block of channels of one sequence; `count` of them exist
  T* data;
  int64_t stride;
  int64_t count;

  Channels(const TokenRows& rows, const TokenConv& conv, int64_t batch, int64_t channel)
      : data((T*)rows.data + batch * rows.batch_stride + channel),
        stride(rows.token_stride),
        count(conv.channels - channel) {}

  static inline __attribute__((always_inline)) int in_use(int64_t count, int vector) {
    const int64_t rest = count - vector * kLanes;
    return rest >= kLanes ? kLanes : rest > 0 ? (int)rest : 0;
  }
};

// One token's vectors of a block; of the last block only what exists is touched.
template <class T>
INLINE void load_token(const Channels<T>& from, int64_t token, Vec (&to)[kWidth]) {
  const T* at = from.data + token * from.stride;
  for (int v = 0; v < kWidth; v++)
    to[v] = from.count >= kBlockChannels ? load(at + v * kLanes)
                                         : load(at + v * kLanes, Channels<T>::in_use(from.count, v));
}

template <class T>
INLINE void store_token(const Channels<T>& to, int64_t token, const Vec (&from)[kWidth]) {
  T* at = to.data + token * to.stride;
  for (int v = 0; v < kWidth; v++) {
    if (to.count >= kBlockChannels)
      store(at + v * kLanes, from[v]);
    else
      store(at + v * kLanes, from[v], Channels<T>::in_use(to.count, v));
  }
}

INLINE void load_taps(const TokenConv& conv, int64_t channel, Vec (&taps)[kTaps][kWidth]) {
  for (int k = 0; k < kTaps; k++)
    for (int v = 0; v < kWidth; v++) taps[k][v] = load(conv.taps + k * conv.tap_stride + channel + v * kLanes);
}

INLINE void shift(Vec (&window)[kTaps][kWidth]) {
  for (int k = 0; k + 1 < kTaps; k++)
    for (int v = 0; v < kWidth; v++) window[k][v] = window[k + 1][v];
}

// The window's newest entry becomes x at `token`, zero outside the sequence.
template <class T>
INLINE void push(Vec (&window)[kTaps][kWidth], const Channels<T>& x, int64_t token, int64_t tokens) {
  shift(window);
  if (token >= 0 && token < tokens)
    load_token(x, token, window[kTaps - 1]);
  else
    for (int v = 0; v < kWidth; v++) window[kTaps - 1][v] = Vec{};
}

INLINE Vec weighted(const Vec (&taps)[kTaps][kWidth], const Vec (&window)[kTaps][kWidth], int v) {
  return taps[0][v] * window[0][v] + taps[1][v] * window[1][v] + taps[2][v] * window[2][v];
}

template <class T, bool kSilu>
void forward_block(const TokenConv& conv, int64_t batch, TokenRange range, int64_t channel) {
  const Channels<T> x(conv.x, conv, batch, channel), y(conv.y, conv, batch, channel);
  Vec taps[kTaps][kWidth], window[kTaps][kWidth], result[kWidth];
  load_taps(conv, channel, taps);
  const int64_t ahead = conv.first_tap + kTaps - 1;  // of a token, how far the last tap reaches
  for (int64_t t = range.begin - kTaps + 1; t < range.begin; t++) push(window, x, t + ahead, conv.tokens);
  for (int64_t t = range.begin; t < range.end; t++) {
    push(window, x, t + ahead, conv.tokens);
    for (int v = 0; v < kWidth; v++) {
      const Vec a = weighted(taps, window, v);
      result[v] = kSilu ? a * sigmoid(a, exp_minus_magnitude(a)) : a;
    }
    store_token(y, t, result);
  }
}

// da_t = dy_t silu'(a_t);  dw_k = sum_t da_t x_{t+first+k};  dx_s = sum_k w_k da_{s-first-k}: a convolution of da, which is
// therefore also needed for two tokens beyond the range.
template <class T, bool kSilu>
void backward_block(const TokenConv& conv, int64_t batch, TokenRange range, int64_t channel, float* dtaps) {
  const Channels<T> x(conv.x, conv, batch, channel), dy(conv.dy, conv, batch, channel), dx(conv.dx, conv, batch, channel);
  Vec taps[kTaps][kWidth], window[kTaps][kWidth], gradients[kTaps][kWidth] = {}, sums[kTaps][kWidth] = {};
  load_taps(conv, channel, taps);
  const int64_t ahead = conv.first_tap + kTaps - 1;
  const int64_t first = range.begin - ahead, last = range.end - 1 - conv.first_tap;  // of da
  for (int64_t t = first - kTaps + 1; t < first; t++) push(window, x, t + ahead, conv.tokens);
  for (int64_t t = first; t <= last; t++) {
    push(window, x, t + ahead, conv.tokens);
    shift(gradients);
    Vec da[kWidth] = {};
    if (t >= 0 && t < conv.tokens) {
      load_token(dy, t, da);
      for (int v = 0; kSilu && v < kWidth; v++) {
        const Vec a = weighted(taps, window, v), s = sigmoid(a, exp_minus_magnitude(a));
        da[v] *= s * (1.0f + a * (1.0f - s));
      }
    }
    for (int v = 0; v < kWidth; v++) gradients[kTaps - 1][v] = da[v];
    if (t >= range.begin && t < range.end)
      for (int k = 0; k < kTaps; k++)
        for (int v = 0; v < kWidth; v++) sums[k][v] += da[v] * window[k][v];
    if (t < first + kTaps - 1) continue;
    Vec result[kWidth];
    for (int v = 0; v < kWidth; v++)
      result[v] = taps[0][v] * gradients[2][v] + taps[1][v] * gradients[1][v] + taps[2][v] * gradients[0][v];
    store_token(dx, t + conv.first_tap, result);
  }
  for (int k = 0; k < kTaps; k++)
    for (int v = 0; v < kWidth; v++) {
      float* at = dtaps + k * conv.tap_stride + channel + v * kLanes;
      store(at, load(at) + sums[k][v]);
    }
}

template <class T, bool kSilu>
void forward_all(const TokenConv& conv, int64_t batch, TokenRange range) {
  for (int64_t c = 0; c < conv.channels; c += kBlockChannels) forward_block<T, kSilu>(conv, batch, range, c);
}

template <class T, bool kSilu>
void backward_all(const TokenConv& conv, int64_t batch, TokenRange range, float* dtaps) {
  for (int64_t c = 0; c < conv.channels; c += kBlockChannels) backward_block<T, kSilu>(conv, batch, range, c, dtaps);
}

void forward(const TokenConv& conv, int64_t batch, TokenRange range) {
  if (conv.bfloat16)
    conv.silu ? forward_all<bfloat16, true>(conv, batch, range) : forward_all<bfloat16, false>(conv, batch, range);
  else
    conv.silu ? forward_all<float, true>(conv, batch, range) : forward_all<float, false>(conv, batch, range);
}

void backward(const TokenConv& conv, int64_t batch, TokenRange range, float* dtaps) {
  if (conv.bfloat16)
    conv.silu ? backward_all<bfloat16, true>(conv, batch, range, dtaps)
              : backward_all<bfloat16, false>(conv, batch, range, dtaps);
  else
    conv.silu ? backward_all<float, true>(conv, batch, range, dtaps)
              : backward_all<float, false>(conv, batch, range, dtaps);
}

}  // namespace

namespace mambavision {

extern const TokenConvKernels ISA_SYMBOL(token_conv_kernels);
const TokenConvKernels ISA_SYMBOL(token_conv_kernels) = {forward, backward};

}  // namespace mambavision
