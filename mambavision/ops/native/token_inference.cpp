// Token blocks for inference in bfloat16, each one operator: x + mixer(LN(x)), x + attention(LN(x)), x + mlp(LN(x)).
//
// A thread takes a window (or, for the MLP, a tile of rows) through all steps while it lies in the second-level cache; only x
// is read from memory and only the result written. Products are summed in float32. Layer scales are in the weights.
#include <torch/library.h>

#include "panel_pipeline.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "depthwise_conv_kernel.h"
#include "isa.h"
#include "pack_kernel.h"
#include "row_kernels.h"
#include "scan_kernel.h"
#include "scratch.h"

namespace mambavision {
namespace {

using at::Tensor;

constexpr int64_t kMlpRows = 224;       // of a tile at least: a weight that was fetched serves enough of them
constexpr int64_t kMlpColumns = 320;    // of the hidden layer at once: their part of both weights stays near while rows go by
constexpr int64_t kGroupRows = 224;     // of the windows that a thread takes at once

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

const RowKernels& row_kernels() { return ISA_TABLE(row_kernels); }
const PackKernels& pack_kernels() { return ISA_TABLE(pack_kernels); }

const float* floats(const Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), "expected contiguous float32");
  return tensor.const_data_ptr<float>();
}

// Windows (b, L, C) of bfloat16 on the CPU, for inference only.
Tensor checked(const Tensor& x, int64_t channels) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.scalar_type() == at::kBFloat16 && x.is_cpu() && x.size(2) == channels,
                    "fused inference takes bfloat16 tokens (windows, tokens, ", channels, ") on the CPU, got ",
                    x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(!(at::GradMode::is_enabled() && x.requires_grad()),
              "a model made by fuse_for_inference has no backward; use the model it was made from, or torch.no_grad()");
  return x.contiguous();
}

struct Norm {  // weight and bias, (2, C)
  const float *weight, *bias;
  int64_t channels;
  float eps;

  Norm(const Tensor& parameters, double eps)
      : weight(floats(parameters)), bias(weight + parameters.size(1)), channels(parameters.size(1)), eps(eps) {}
  void apply(const BFloat16* x, int64_t rows, BFloat16* out, int64_t stride) const {
    row_kernels().layer_norm(x, channels, rows, channels, weight, bias, eps, out, stride);
  }
};

// Short windows go together, so that a weight that was fetched serves enough rows; but every thread gets some.
int64_t windows_at_once(int64_t windows, int64_t tokens) {
  return std::max<int64_t>(1, std::min(kGroupRows / tokens, windows / at::get_num_threads()));
}

Tensor mlp_inference(const Tensor& x_in, const Tensor& norm_in, double eps, const Tensor& up_in, const Tensor& up_bias,
                     const Tensor& down_in, const Tensor& down_bias) {
  const PackedWeight up(up_in), down(down_in);
  const Norm norm(norm_in, eps);
  const Tensor x = checked(x_in, norm.channels), y = at::empty_like(x);
  const int64_t channels = norm.channels, hidden = down.inner, rows = x.size(0) * x.size(1);
  TORCH_CHECK(up.inner == channels && up.has_columns(hidden) && down.has_columns(channels), "the weights do not fit");
  if (rows == 0) return y;
  const BFloat16* from = x.const_data_ptr<BFloat16>();
  BFloat16* to = y.data_ptr<BFloat16>();
  const int64_t tile_rows = std::max(kMlpRows, round_up(2 * channels / 3, kPanelRows));  // wide weights come from further away
  const int64_t tiles = divide_up(rows, std::min(tile_rows, divide_up(rows, at::get_num_threads())));
  const int64_t chunk = std::min(kMlpColumns, hidden), stride = row_stride(channels);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    PanelPipeline pipeline(units);
    const int64_t most = divide_up(rows, tiles) + kPanelRows;
    Scratch scratch;
    BFloat16 *normalised, *activated;
    float* down_sums;
    scratch.reserve(normalised, most * stride, activated, kPanelRows * chunk, down_sums,
                    most * down.blocks * kPanelColumns);  // (panels, blocks, rows of a panel, columns of a block)
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first, height = panel_rows(count);
      norm.apply(from + first * channels, count, normalised, stride);
      const Finish result = added_to(from + first * channels, to + first * channels, floats(down_bias));
      for (int64_t start = 0; start < hidden; start += chunk)
        for (int64_t row = 0; row < count; row += height) {
          const int64_t width = std::min(chunk, hidden - start), live = std::min(height, count - row);
          pipeline.next_rows(live, chunk);
          for (int64_t column = start; column < start + width; column += kPanelColumns) {
            const int64_t columns = std::min(kPanelColumns, start + width - column);
            pipeline.multiply(height, columns, channels, normalised + row * stride, stride, up.at(column / kPanelColumns),
                              pipeline.sums(), kPanelColumns);
            pipeline.finish_later(pipeline.sums(), columns,
                                  into(activated + column - start, floats(up_bias) + column, Activation::gelu));
          }
          pipeline.flush();
          pipeline.next_rows(live, channels, channels);
          for (int64_t block = 0; block < down.blocks; block++) {
            const int64_t column = block * kPanelColumns, columns = std::min(kPanelColumns, channels - column);
            float* sums = down_sums + (row * down.blocks + block * height) * kPanelColumns;
            pipeline.multiply(height, columns, width, activated, chunk, down.at(block, start), sums, kPanelColumns, start > 0);
            if (start + width == hidden)
              pipeline.finish_later(sums, columns, part_at(result, row, column, channels, channels));
          }
        }
      pipeline.flush();
    }
  });
  return y;
}

// One head's queries (tokens, width; stride apart) with rows of whole cache lines, without which the matrix units are slow;
// the padding is left alone.
void pack_queries(const BFloat16* queries, int64_t stride, int64_t tokens, int64_t width, int64_t inner, BFloat16* packed) {
  for (int64_t t = 0; t < tokens; t++) std::memcpy(packed + t * inner, queries + t * stride, width * sizeof(BFloat16));
}

// One head's keys as the right factor of queries x keys^T, in blocks of tokens: (blocks, inner / 2, kPanelColumns, 2).
// Padding of the inner dimension is left alone.
void pack_keys(const BFloat16* keys, int64_t stride, int64_t tokens, int64_t width, int64_t inner, BFloat16* packed) {
  for (int64_t t = 0; t < tokens; t += kPanelColumns)
    pack_kernels().pair_columns({keys + t * stride, true, std::min(kPanelColumns, tokens - t), width, stride},
                                reinterpret_cast<uint32_t*>(packed + t * inner), kPanelColumns, kPanelColumns);
}

// One head's values as the right factor of weights x values, in blocks of columns: (blocks, padded tokens / 2, kPanelColumns,
// 2); padding of tokens is left alone.
void pack_values(const BFloat16* values, int64_t stride, int64_t tokens, int64_t width, int64_t padded, BFloat16* packed) {
  for (int64_t c = 0; c < width; c += kPanelColumns)
    pack_kernels().pair_rows({values + c, true, tokens, std::min(kPanelColumns, width - c), stride},
                             reinterpret_cast<uint32_t*>(packed + c * padded), kPanelColumns, kPanelColumns, nullptr);
}

Tensor attention_inference(const Tensor& x_in, const Tensor& norm_in, double eps, const Tensor& qkv_in,
                           const Tensor& qkv_bias, const Tensor& proj_in, const Tensor& proj_bias, int64_t heads) {
  const PackedWeight qkv_weight(qkv_in), proj(proj_in);
  const Norm norm(norm_in, eps);
  const Tensor x = checked(x_in, norm.channels), y = at::empty_like(x);
  const int64_t channels = norm.channels, tokens = x.size(1), width = channels / heads;
  TORCH_CHECK(qkv_weight.inner == channels && qkv_weight.has_columns(3 * channels) && proj.inner == channels &&
                  proj.has_columns(channels) && channels % heads == 0 && width % 2 == 0,
              "the weights do not fit");
  const int64_t padded = round_up(tokens, kPanelColumns), inner = round_up(width, kTileInner), height = panel_rows(tokens);
  const int64_t stride = row_stride(channels);
  const float scale = 1.0f / std::sqrt((float)width);
  const int64_t group = windows_at_once(x.size(0), tokens), most = group * tokens + kPanelRows;
  at::parallel_for(0, divide_up(x.size(0), group), 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    PanelPipeline pipeline(units);
    Scratch scratch;
    BFloat16 *normalised, *qkv, *queries, *keys, *values, *weights;
    float *scores, *inverse;
    const int64_t value_size = padded * round_up(width, kPanelColumns);
    scratch.reserve(normalised, most * stride, qkv, most * 3 * channels, queries, (tokens + kPanelRows) * inner, keys,
                    padded * inner, values, value_size, weights, kPanelRows * padded, scores, kPanelRows * padded, inverse,
                    kPanelRows);
    std::memset(queries, 0, (tokens + kPanelRows) * inner * sizeof(BFloat16));
    std::memset(keys, 0, padded * inner * sizeof(BFloat16));
    std::memset(values, 0, value_size * sizeof(BFloat16));
    BFloat16* mixed = normalised;  // no longer needed by then
    for (int64_t first = begin * group; first < std::min(end * group, x.size(0)); first += group) {
      const int64_t windows = std::min(group, x.size(0) - first), rows = windows * tokens;
      const BFloat16* from = x.const_data_ptr<BFloat16>() + first * tokens * channels;
      norm.apply(from, rows, normalised, stride);
      linear(pipeline, rows, normalised, stride, qkv_weight, 3 * channels, into(qkv, floats(qkv_bias)), 3 * channels);
      for (int64_t item = 0; item < windows * heads; item++) {
        const int64_t offset = item / heads * tokens, column = item % heads * width;
        const BFloat16* head = qkv + offset * 3 * channels + column;
        pack_queries(head, 3 * channels, tokens, width, inner, queries);
        pack_keys(head + channels, 3 * channels, tokens, width, inner, keys);
        pack_values(head + 2 * channels, 3 * channels, tokens, width, padded, values);
        for (int64_t row = 0; row < tokens; row += height) {
          const int64_t some = std::min(height, tokens - row);
          for (int64_t token = 0; token < tokens; token += kPanelColumns)
            pipeline.multiply(height, kPanelColumns, inner, queries + row * inner, inner, keys + token * inner, scores + token,
                              padded);
          row_kernels().softmax(scores, padded, some, tokens, padded, scale, weights, padded, inverse);
          pipeline.next_rows(some, stride);
          for (int64_t c = 0; c < width; c += kPanelColumns) {
            const int64_t live = std::min(kPanelColumns, width - c);
            pipeline.multiply(height, live, padded, weights, padded, values + c * padded, pipeline.sums(), kPanelColumns);
            Finish normalise = into(mixed + (offset + row) * stride + column + c);
            normalise.row_scale = inverse;
            pipeline.finish_later(pipeline.sums(), live, normalise);
          }
        }
      }
      pipeline.flush();
      linear(pipeline, rows, mixed, stride, proj, channels,
             added_to(from, y.data_ptr<BFloat16>() + first * tokens * channels, floats(proj_bias)), channels, channels);
    }
  });
  return y;
}

// x_proj gives each token (dt, zeros up to a multiple of 32, B, C); `taps` is (2, 3, padded channels) for x and z; `table` is
// (padded states + 3, padded channels): A log2(e), its magnitude, D, and the step's bias.
Tensor mixer_inference(const Tensor& x_in, const Tensor& norm_in, double eps, const Tensor& in_proj_in,
                       const Tensor& taps, const Tensor& x_proj_in, const Tensor& dt_proj_in, const Tensor& table,
                       const Tensor& out_proj_in, int64_t states) {
  const PackedWeight in_proj(in_proj_in), x_proj(x_proj_in), dt_proj(dt_proj_in), out_proj(out_proj_in);
  const Norm norm(norm_in, eps);
  const Tensor x = checked(x_in, norm.channels), y = at::empty_like(x);
  const int64_t channels = norm.channels, half = channels / 2, tokens = x.size(1), rank = dt_proj.inner;
  const int64_t dbc_width = x_proj.blocks * kPanelColumns;
  TORCH_CHECK(in_proj.inner == channels && in_proj.has_columns(channels) && x_proj.inner == half &&
                  dbc_width >= rank + 2 * states && dt_proj.has_columns(half) && out_proj.inner == channels &&
                  out_proj.has_columns(channels),
              "the weights do not fit");
  const ScanKernels& scan_kernels = ISA_TABLE(scan_kernels);
  const TokenConvKernels& conv_kernels = ISA_TABLE(token_conv_kernels);

  ScanProblem scan{};
  scan.batch = 1, scan.tokens = tokens, scan.channels = half, scan.states = states;
  scan.tiles = divide_up(tokens, kTileTokens);
  scan.padded_states = round_up(states, kStatePad), scan.padded_channels = round_up(half, kChannelPad);
  TORCH_CHECK(table.size(0) == scan.padded_states + 3 && table.size(1) == scan.padded_channels, "the table does not fit");
  scan.channels_are_bfloat16 = scan.states_are_bfloat16 = true;
  scan.A_log2e = floats(table);
  scan.A_magnitude = scan.A_log2e + scan.padded_states * scan.padded_channels;
  scan.D = scan.A_magnitude + scan.padded_channels, scan.bias = scan.D + scan.padded_channels;
  const int64_t stride = row_stride(channels);
  const Range all_blocks = {0, divide_up(half, scan_kernels.lanes)};

  TokenConv conv{};
  conv.tokens = tokens, conv.channels = half, conv.first_tap = -1, conv.silu = conv.bfloat16 = true;
  conv.tap_stride = taps.size(2);
  const int64_t group = windows_at_once(x.size(0), tokens), most = group * tokens + kPanelRows;
  at::parallel_for(0, divide_up(x.size(0), group), 1, [&](int64_t begin, int64_t end) {
    MatrixUnits units;
    PanelPipeline pipeline(units);
    Scratch scratch;
    BFloat16 *normalised, *projected, *u, *dbc, *delta, *joined;
    scratch.reserve(normalised, most * stride, projected, most * channels, u, most * half, dbc, most * dbc_width, delta,
                    most * half, joined, most * stride);
    for (int64_t first = begin * group; first < std::min(end * group, x.size(0)); first += group) {
      const int64_t windows = std::min(group, x.size(0) - first), rows = windows * tokens;
      const BFloat16* from = x.const_data_ptr<BFloat16>() + first * tokens * channels;
      norm.apply(from, rows, normalised, stride);
      linear(pipeline, rows, normalised, stride, in_proj, channels, into(projected), channels);
      auto convolve = [&](int64_t branch, BFloat16* out, int64_t out_stride) {
        TokenConv one = conv;
        one.taps = floats(taps) + branch * kTaps * conv.tap_stride;
        one.x = {projected + branch * half, tokens * channels, channels}, one.y = {out, tokens * out_stride, out_stride};
        for (int64_t window = 0; window < windows; window++) conv_kernels.forward(one, window, {0, tokens});
      };
      convolve(0, u, half);
      convolve(1, joined + half, stride);
      linear(pipeline, rows, u, half, x_proj, dbc_width, into(dbc), dbc_width);
      linear(pipeline, rows, dbc, dbc_width, dt_proj, half, into(delta), half);
      ScanProblem p = scan;
      p.u = {u, tokens * half, half}, p.delta = {delta, tokens * half, half};
      p.B = {dbc + rank, tokens * dbc_width, dbc_width}, p.C = {dbc + rank + states, tokens * dbc_width, dbc_width};
      p.y = {joined, tokens * stride, stride};
      for (int64_t window = 0; window < windows; window++) scan_kernels.forward(p, window, all_blocks);
      linear(pipeline, rows, joined, stride, out_proj, channels,
             added_to(from, y.data_ptr<BFloat16>() + first * tokens * channels), channels, channels);
    }
  });
  return y;
}

}  // namespace
}  // namespace mambavision

TORCH_LIBRARY_IMPL(mambavision, CPU, library) {
  library.impl("mlp_inference", mambavision::mlp_inference);
  library.impl("attention_inference", mambavision::attention_inference);
  library.impl("mixer_inference", mambavision::mixer_inference);
}


TORCH_LIBRARY_FRAGMENT(mambavision, library) {
  library.def(
      "mlp_inference(Tensor x, Tensor norm, float eps, Tensor up, Tensor up_bias, Tensor down, Tensor down_bias) -> Tensor");
  library.def(
      "attention_inference(Tensor x, Tensor norm, float eps, Tensor qkv, Tensor qkv_bias, Tensor proj, Tensor proj_bias, "
      "int heads) -> Tensor");
  library.def(
      "mixer_inference(Tensor x, Tensor norm, float eps, Tensor in_proj, Tensor taps, Tensor x_proj, Tensor dt_proj, "
      "Tensor table, Tensor out_proj, int states) -> Tensor");
}
