// Epilogues, layer normalisation and softmax over rows of bfloat16 and float32, for one instruction set.
#include "row_kernels.h"

#include "gelu_table.h"
#include "isa.h"
#include "simd.h"

namespace {

using mambavision::Activation;
using mambavision::Finish;
using mambavision::GeluTable;

INLINE int live_lanes(int64_t columns, int64_t at) { return columns - at < kLanes ? (int)(columns - at) : kLanes; }

// GELU for a result that is rounded to bfloat16: absolute error below 3e-6, relative error below 3e-4 down to x = -3.
INLINE Vec gelu_rough(Vec x, const GeluTable& table) {
  const Vec distance = at_most(magnitude(x), GeluTable::kFar);
#if defined(__AVX512F__)
  // A number so large that its last bits count the pieces.
  const __m512i piece = (__m512i)(distance * GeluTable::kPiecesPerUnit + 12582912.0f);
  auto coefficient = [&](int i) { return (Vec)_mm512_permutexvar_ps(piece, _mm512_loadu_ps(table.coefficient[i])); };
#else
  const Ints piece = __builtin_convertvector(distance * GeluTable::kPiecesPerUnit + 0.5f, Ints);
  auto coefficient = [&](int i) {
    Vec value;
    for (int lane = 0; lane < kLanes; lane++) value[lane] = table.coefficient[i][piece[lane] & (GeluTable::kPieces - 1)];
    return value;
  };
#endif
  const Vec tail = coefficient(0) + distance * (coefficient(1) + distance * (coefficient(2) + distance * coefficient(3)));
  return at_least(x, 0.0f) - distance * tail;
}

template <Activation kActivation>
INLINE Vec activate(Vec x) {
  if (kActivation == Activation::relu) return at_least(x, 0.0f);
  if (kActivation == Activation::gelu) return gelu_rough(x, mambavision::kGeluExactTable);
  if (kActivation == Activation::gelu_tanh) return gelu_rough(x, mambavision::kGeluTanhTable);
  return x;
}

template <Activation kActivation, bool kScale, bool kResidual>
void finish_rows(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int live = live_lanes(columns, c);
    const Vec bias = f.bias ? load(f.bias + c, live) : Vec{};
    const bfloat16* residual = (const bfloat16*)f.residual + c;
    bfloat16* out = (bfloat16*)f.out + c;
    for (int64_t r = 0; r < rows; r++) {
      Vec value = load(sums + r * stride + c, live);
      value = activate<kActivation>(kScale ? value * f.row_scale[r] + bias : value + bias);
      if (kResidual) value += load(residual + r * f.residual_stride, live);
      store(out + r * f.out_stride, value, live);
    }
  }
}

template <Activation kActivation>
void finish_any(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  if (f.row_scale)
    f.residual ? finish_rows<kActivation, true, true>(sums, stride, rows, columns, f)
               : finish_rows<kActivation, true, false>(sums, stride, rows, columns, f);
  else
    f.residual ? finish_rows<kActivation, false, true>(sums, stride, rows, columns, f)
               : finish_rows<kActivation, false, false>(sums, stride, rows, columns, f);
}

void finish(const float* sums, int64_t stride, int64_t rows, int64_t columns, const Finish& f) {
  switch (f.activation) {
    case Activation::none: return finish_any<Activation::none>(sums, stride, rows, columns, f);
    case Activation::relu: return finish_any<Activation::relu>(sums, stride, rows, columns, f);
    case Activation::gelu: return finish_any<Activation::gelu>(sums, stride, rows, columns, f);
    case Activation::gelu_tanh: return finish_any<Activation::gelu_tanh>(sums, stride, rows, columns, f);
  }
}

INLINE Vec clear_from(Vec value, int live) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_mov_ps((__mmask16)first_lanes(live), (__m512)value);
#else
  if (__builtin_expect(live < kLanes, 0))
    for (int lane = live; lane < kLanes; lane++) value[lane] = 0.0f;
  return value;
#endif
}

constexpr int kChains = 4;  // sums at once, as each addition waits for the one before it

// Adds up of(vector's index) over so many vectors.
template <class Of>
INLINE float sum_of(int64_t vectors, const Of& of) {
  Vec sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= vectors; i += kChains)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; k++) sums[k] += of(i + k);
  for (; i < vectors; i++) sums[0] += of(i);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void layer_norm(const void* x, int64_t x_stride, int64_t rows, int64_t columns, const float* weight, const float* bias,
                float eps, void* out, int64_t out_stride) {
  const float share = 1.0f / columns;
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t r = 0; r < rows; r++) {
    const bfloat16* from = (const bfloat16*)x + r * x_stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    const auto at = [&](int64_t i) { return load(from + i * kLanes, live_lanes(columns, i * kLanes)); };
    const float mean = share * sum_of(vectors, at);
    const float variance = share * sum_of(vectors, [&](int64_t i) {
      const Vec centred = clear_from(at(i) - mean, live_lanes(columns, i * kLanes));
      return centred * centred;
    });
    const float scale = 1.0f / __builtin_sqrtf(variance + eps);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int live = live_lanes(columns, c);
      const Vec normalised = (load(from + c, live) - mean) * scale;
      store(to + c, normalised * load(weight + c, live) + load(bias + c, live), live);
    }
  }
}

void softmax(const float* scores, int64_t stride, int64_t rows, int64_t columns, int64_t padded, float scale, void* out,
             int64_t out_stride, float* inverse_sums) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t r = 0; r < rows; r++) {
    const float* row = scores + r * stride;
    bfloat16* to = (bfloat16*)out + r * out_stride;
    // A partial vector may take scores of the padding into account: any maximum that is not far above the row's will do.
    Vec most = load(row), other = most;
    int64_t i = 1;
    for (; i + 2 <= vectors; i += 2) {
      most = larger(load(row + i * kLanes), most);
      other = larger(load(row + (i + 1) * kLanes), other);
    }
    if (i < vectors) most = larger(load(row + i * kLanes), most);
    const float factor = scale * kLog2E, offset = largest_lane(larger(other, most)) * factor;
    inverse_sums[r] = 1.0f / sum_of(vectors, [&](int64_t at) {  // a NaN of the row is in it
      Vec power = exp2_product_rough(at_least(load(row + at * kLanes) * factor - offset, -kExponentLimit), splat(1.0f));
      power = clear_from(power, live_lanes(columns, at * kLanes));
      store(to + at * kLanes, power);
      return power;
    });
    for (int64_t c = vectors * kLanes; c < padded; c += kLanes) store(to + c, Vec{});
  }
}

}  // namespace

namespace mambavision {

extern const RowKernels ISA_SYMBOL(row_kernels);
const RowKernels ISA_SYMBOL(row_kernels) = {finish, layer_norm, softmax};

}  // namespace mambavision
