// Batch and layer normalisation of training over rows of bfloat16 channels, with what stands beside them: activations,
// residual sums, scales of stochastic depth. For one instruction set.
#include "norm_kernel.h"

#include "gelu_forms.h"
#include "simd.h"

namespace {

using mambavision::BatchNorm;
using mambavision::LayerNorm;
using mambavision::NormActivation;

constexpr int64_t kTileRows = 64;  // rows that stay in the first-level cache while their channels are gone through

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }
INLINE const bfloat16* at(const void* data, int64_t index) { return (const bfloat16*)data + index; }
INLINE bfloat16* at(void* data, int64_t index) { return (bfloat16*)data + index; }
INLINE Vec zero_beyond(Vec value, int live) {
  if (__builtin_expect(live < kLanes, 0))
    for (int lane = live; lane < kLanes; lane++) value[lane] = 0.0f;
  return value;
}

template <int kWidth>
INLINE void statistics_of(const BatchNorm& n, int64_t begin, int64_t end, int64_t c, const float* pivot, float* sums,
                          float* squares) {
  Vec sum[kWidth], square[kWidth], centre[kWidth];
  int live[kWidth];
  for (int v = 0; v < kWidth; v++) {
    live[v] = kWidth > 1 ? kLanes : live_lanes(n.channels, c);
    sum[v] = load(sums + c + v * kLanes, live[v]), square[v] = load(squares + c + v * kLanes, live[v]);
    centre[v] = load(pivot + c + v * kLanes, live[v]);
  }
  for (int64_t r = begin; r < end; r++)
    for (int v = 0; v < kWidth; v++) {
      const Vec off = load(at(n.x, r * n.channels + c + v * kLanes), live[v]) - centre[v];
      sum[v] += off, square[v] += off * off;
    }
  for (int v = 0; v < kWidth; v++)
    store(sums + c + v * kLanes, sum[v], live[v]), store(squares + c + v * kLanes, square[v], live[v]);
}

void batch_statistics(const BatchNorm& n, int64_t begin, int64_t end, const float* pivot, float* sums, float* squares) {
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t last = row + kTileRows < end ? row + kTileRows : end;
    int64_t c = 0;
    for (; c + 4 * kLanes <= n.channels; c += 4 * kLanes) statistics_of<4>(n, row, last, c, pivot, sums, squares);
    for (; c + 2 * kLanes <= n.channels; c += 2 * kLanes) statistics_of<2>(n, row, last, c, pivot, sums, squares);
    for (; c < n.channels; c += kLanes) statistics_of<1>(n, row, last, c, pivot, sums, squares);
  }
}

template <NormActivation kActivation, bool kResidual>
void apply_rows(const BatchNorm& n, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const Vec keep = splat(n.row_scale ? n.row_scale[r / n.rows_per_image] : 1.0f);
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      Vec value = load(at(n.x, r * n.channels + c), live) * load(n.scale + c, live) + load(n.shift + c, live);
      if (kActivation == NormActivation::relu) value = at_least(value, 0.0f);
      if (kActivation == NormActivation::gelu_tanh) value = value * gelu_tanh(value).gate;
      if (kResidual) value = load(at(n.residual, r * n.channels + c), live) + keep * value;
      store(at(n.y, r * n.channels + c), value, live);
    }
  }
}

void batch_apply(const BatchNorm& n, int64_t begin, int64_t end) {
  if (n.residual) return apply_rows<NormActivation::none, true>(n, begin, end);
  if (n.activation == NormActivation::relu) return apply_rows<NormActivation::relu, false>(n, begin, end);
  if (n.activation == NormActivation::gelu_tanh) return apply_rows<NormActivation::gelu_tanh, false>(n, begin, end);
  apply_rows<NormActivation::none, false>(n, begin, end);
}

template <NormActivation kActivation>
void reduce_rows(const BatchNorm& n, int64_t begin, int64_t end, float* sums, float* products) {
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t last = row + kTileRows < end ? row + kTileRows : end;
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      const Vec scale = load(n.scale + c, live), shift = load(n.shift + c, live), mean = load(n.mean + c, live);
      Vec sum = load(sums + c, live), product = load(products + c, live);
      for (int64_t r = row; r < last; r++) {
        const Vec x = load(at(n.x, r * n.channels + c), live);
        Vec d = load(at(n.dy, r * n.channels + c), live);
        if (kActivation == NormActivation::relu) d = x * scale + shift > 0.0f ? d : Vec{};
        if (kActivation == NormActivation::gelu_tanh) d = d * gelu_tanh(x * scale + shift).derivative;
        if (kActivation == NormActivation::none && n.row_scale) d *= n.row_scale[r / n.rows_per_image];
        store(at(n.dx, r * n.channels + c), d, live);
        sum += d, product += d * (x - mean);
      }
      store(sums + c, sum, live), store(products + c, product, live);
    }
  }
}

void batch_reduce(const BatchNorm& n, int64_t begin, int64_t end, float* sums, float* products) {
  if (n.activation == NormActivation::relu) return reduce_rows<NormActivation::relu>(n, begin, end, sums, products);
  if (n.activation == NormActivation::gelu_tanh)
    return reduce_rows<NormActivation::gelu_tanh>(n, begin, end, sums, products);
  reduce_rows<NormActivation::none>(n, begin, end, sums, products);
}

void batch_backward(const BatchNorm& n, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++)
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      const Vec d = load(at((const void*)n.dx, r * n.channels + c), live), x = load(at(n.x, r * n.channels + c), live);
      store(at(n.dx, r * n.channels + c),
            d * load(n.scale + c, live) - x * load(n.slope + c, live) + load(n.offset + c, live), live);
    }
}

void layer_forward(const LayerNorm& n, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const int64_t first = r * n.channels;
    const Vec keep = splat(n.row_scale ? n.row_scale[r / n.rows_per_image] : 1.0f);
    const bfloat16* from = at(n.branch ? (const void*)n.sum : n.x, first);
    Vec sum = {};
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      Vec value = load(at(n.x, first + c), live);
      if (n.branch) {
        value += keep * load(at(n.branch, first + c), live);
        store(at(n.sum, first + c), value, live);
        value = load(from + c, live);  // as the backward will see it
      }
      sum += value;
    }
    const float mean = sum_lanes(sum) / n.channels;
    Vec squares = {};
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      const Vec centred = zero_beyond(load(from + c, live) - mean, live);
      squares += centred * centred;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum_lanes(squares) / n.channels + n.eps);
    n.statistics[2 * r] = mean, n.statistics[2 * r + 1] = inverse;
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      const Vec normalised = (load(from + c, live) - mean) * inverse;
      store(at(n.y, first + c), normalised * load(n.weight + c, live) + load(n.bias + c, live), live);
    }
  }
}

void layer_backward(const LayerNorm& n, int64_t begin, int64_t end, float* dweight, float* dbias) {
  for (int64_t r = begin; r < end; r++) {
    const int64_t first = r * n.channels;
    const float mean = n.statistics[2 * r], inverse = n.statistics[2 * r + 1];
    Vec sum = {}, product = {};
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      const Vec normalised = (load(at(n.x, first + c), live) - mean) * inverse, dy = load(at(n.dy, first + c), live);
      const Vec weighted = dy * load(n.weight + c, live);  // zero beyond the last channel, as dy is
      store(dweight + c, load(dweight + c, live) + dy * normalised, live);
      store(dbias + c, load(dbias + c, live) + dy, live);
      sum += weighted, product += weighted * normalised;
    }
    const float average = sum_lanes(sum) / n.channels, slope = sum_lanes(product) / n.channels;
    const float keep = n.row_scale ? n.row_scale[r / n.rows_per_image] : 1.0f;
    for (int64_t c = 0; c < n.channels; c += kLanes) {
      const int live = live_lanes(n.channels, c);
      const Vec normalised = (load(at(n.x, first + c), live) - mean) * inverse;
      Vec dx = (load(at(n.dy, first + c), live) * load(n.weight + c, live) - average - normalised * slope) * inverse;
      if (n.dsum) dx += load(at(n.dsum, first + c), live);
      store(at(n.dx, first + c), dx, live);
      if (n.dbranch) store(at(n.dbranch, first + c), dx * keep, live);
    }
  }
}

}  // namespace

namespace mambavision {

extern const NormKernels ISA_SYMBOL(norm_kernels);
const NormKernels ISA_SYMBOL(norm_kernels) = {batch_statistics, batch_apply,   batch_reduce,
                                              batch_backward,   layer_forward, layer_backward};

}  // namespace mambavision
