// The operators of normalisation in a training step, on bfloat16 rows of channels (a channels-last map, tokens):
//
//   batch_norm_training   activation(BN(x)), or residual + row_scale * BN(x); statistics of this batch
//   layer_norm_training   sum = x + row_scale * branch (or x itself) and LN(sum)
//
// Forward and backward go over memory twice (batch) or once (layer). Sums are cut by the problem's size alone, never by the
// number of threads, and added up in a fixed order: results are bitwise repeatable.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "norm_kernel.h"
#include "operators.h"

namespace mambavision {
namespace {

constexpr int64_t kSlots = 64, kSlotRows = 64;  // at most so many partial sums, of at least so many rows
constexpr int64_t kGrainRows = 64;              // rows worth a thread of their own

const NormKernels& kernels() { return ISA_TABLE(norm_kernels); }

int64_t slots_of(int64_t rows) { return std::clamp<int64_t>(rows / kSlotRows, 1, kSlots); }

template <class Work>  // work(slot, begin, end)
void over_slots(int64_t rows, int64_t slots, const Work& work) {
  at::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; slot++) work(slot, slot * rows / slots, (slot + 1) * rows / slots);
  });
}

const void* data_of(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }
const float* floats_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

void check_rows(const Tensor& x, int64_t channels, const OptionalTensor& row_scale) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 && x.device().is_cpu(),
                    "normalisation in training takes bfloat16 on the CPU, got ", x.scalar_type(), " on ", x.device());
  TORCH_CHECK_VALUE(!row_scale.has_value() || (row_scale->scalar_type() == at::kFloat && row_scale->is_contiguous() &&
                                               row_scale->numel() == x.size(0)),
                    "row_scale must be float32 with one value for each of ", x.size(0), " images");
}

}  // namespace

// ---- batch normalisation ---------------------------------------------------------------------------------------------

namespace {

Tensor last(const Tensor& map) { return map.contiguous(at::MemoryFormat::ChannelsLast); }

BatchNorm describe(const Tensor& x, int64_t activation, const OptionalTensor& row_scale, const Tensor& constants) {
  const float* values = constants.const_data_ptr<float>();
  BatchNorm norm{};
  norm.channels = x.size(1), norm.rows_per_image = x.size(2) * x.size(3);
  norm.activation = static_cast<NormActivation>(activation);
  norm.x = x.const_data_ptr(), norm.row_scale = floats_of(row_scale);
  norm.mean = values, norm.scale = values + 2 * norm.channels, norm.shift = values + 3 * norm.channels;
  return norm;
}

}  // namespace

// y, and (4, channels): mean, inverse deviation, scale, shift.
Two batch_norm_training_forward(const Tensor& x_in, const Tensor& weight, const Tensor& bias,
                                const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
                                double eps, int64_t activation, const OptionalTensor& residual_in,
                                const OptionalTensor& row_scale) {
  check_rows(x_in, x_in.size(1), row_scale);
  TORCH_CHECK_VALUE(x_in.dim() == 4 && weight.numel() == x_in.size(1) && bias.numel() == x_in.size(1) && x_in.numel() > 0,
                    "batch_norm_training wants a map (batch, channels, height, width) and its channels' weights, got ",
                    x_in.sizes(), " and ", weight.sizes());
  TORCH_CHECK_VALUE(!residual_in.has_value() ||
                        (residual_in->sizes() == x_in.sizes() && residual_in->scalar_type() == at::kBFloat16),
                    "the residual must be like x");
  const Tensor x = last(x_in), y = new_like(x);
  const int64_t channels = x.size(1), rows = x.numel() / channels, slots = slots_of(rows);
  const Tensor constants = x.new_empty({4, channels}, at::kFloat);
  BatchNorm norm = describe(x, activation, row_scale, constants);
  std::vector<float> partial(slots * 3 * channels, 0.0f);
  over_slots(rows, slots, [&](int64_t slot, int64_t begin, int64_t end) {
    float* pivot = partial.data() + slot * 3 * channels;  // the slot's first row: near the mean, so little cancels
    const at::BFloat16* row = static_cast<const at::BFloat16*>(norm.x) + begin * channels;
    for (int64_t c = 0; c < channels; c++) pivot[c] = row[c];
    kernels().batch_statistics(norm, begin, end, pivot, pivot + channels, pivot + 2 * channels);
  });
  float* values = constants.mutable_data_ptr<float>();
  const Tensor w = weight.to(at::kFloat).contiguous(), b = bias.to(at::kFloat).contiguous();
  for (int64_t c = 0; c < channels; c++) {
    double count = 0, mean = 0, squares = 0;  // Chan et al.: statistics of two parts joined
    for (int64_t slot = 0; slot < slots; slot++) {
      const double n = (slot + 1) * rows / slots - slot * rows / slots;
      const float* from = partial.data() + slot * 3 * channels + c;
      const double off = from[channels] / n, part = from[2 * channels] - n * off * off, delta = from[0] + off - mean;
      squares += part + delta * delta * count * n / (count + n);
      mean += delta * n / (count + n), count += n;
    }
    const double variance = std::max(squares / count, 0.0), inverse = 1.0 / std::sqrt(variance + eps);
    values[c] = mean, values[channels + c] = inverse;
    values[2 * channels + c] = inverse * w.const_data_ptr<float>()[c];
    values[3 * channels + c] = b.const_data_ptr<float>()[c] - mean * inverse * w.const_data_ptr<float>()[c];
    if (!running_mean.has_value()) continue;
    float *m = running_mean->mutable_data_ptr<float>() + c, *v = running_var->mutable_data_ptr<float>() + c;
    *m = (1.0 - momentum) * *m + momentum * mean;
    *v = (1.0 - momentum) * *v + momentum * squares / std::max(count - 1.0, 1.0);
  }
  const Tensor residual = residual_in.has_value() ? last(*residual_in) : Tensor();
  norm.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  norm.y = y.mutable_data_ptr();
  at::parallel_for(0, rows, kGrainRows, [&](int64_t begin, int64_t end) { kernels().batch_apply(norm, begin, end); });
  return {y, constants};
}

// dx, dweight, dbias.
Three batch_norm_training_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& constants, int64_t activation,
                                   const OptionalTensor& row_scale) {
  const Tensor x = last(x_in), dy = last(dy_in.to(at::kBFloat16)), dx = new_like(x);
  TORCH_CHECK(dy.sizes() == x.sizes(), "batch_norm_training_backward got a gradient of shape ", dy.sizes());
  const int64_t channels = x.size(1), rows = x.numel() / channels, slots = slots_of(rows);
  BatchNorm norm = describe(x, activation, row_scale, constants);
  norm.dy = dy.const_data_ptr(), norm.dx = dx.mutable_data_ptr();
  std::vector<float> partial(slots * 2 * channels, 0.0f), line(2 * channels);
  over_slots(rows, slots, [&](int64_t slot, int64_t begin, int64_t end) {
    float* sums = partial.data() + slot * 2 * channels;
    kernels().batch_reduce(norm, begin, end, sums, sums + channels);
  });
  const Tensor dweight = constants.new_empty({channels}), dbias = new_like(dweight);
  const float *mean = constants.const_data_ptr<float>(), *inverse = mean + channels;
  for (int64_t c = 0; c < channels; c++) {
    double sum = 0, product = 0;
    for (int64_t slot = 0; slot < slots; slot++)
      sum += partial[slot * 2 * channels + c], product += partial[slot * 2 * channels + channels + c];
    dbias.mutable_data_ptr<float>()[c] = sum;
    dweight.mutable_data_ptr<float>()[c] = product * inverse[c];
    const double slope = norm.scale[c] * inverse[c] * inverse[c] * product / rows;
    line[c] = slope, line[channels + c] = slope * mean[c] - norm.scale[c] * sum / rows;
  }
  norm.slope = line.data(), norm.offset = line.data() + channels;
  at::parallel_for(0, rows, kGrainRows, [&](int64_t begin, int64_t end) { kernels().batch_backward(norm, begin, end); });
  return {dx, dweight, dbias};
}

// ---- layer normalisation ---------------------------------------------------------------------------------------------

namespace {

LayerNorm describe(const Tensor& x, const Tensor& weight, const OptionalTensor& row_scale, const Tensor& statistics) {
  LayerNorm norm{};
  norm.channels = x.size(-1), norm.rows_per_image = x.numel() / (x.size(0) * x.size(-1));
  norm.x = x.const_data_ptr(), norm.row_scale = floats_of(row_scale);
  norm.weight = weight.const_data_ptr<float>(), norm.statistics = statistics.mutable_data_ptr<float>();
  return norm;
}

}  // namespace

// sum (x's own copy is not made without a branch: then it is empty), y, statistics.
Three layer_norm_training_forward(const Tensor& x_in, const OptionalTensor& branch_in, const OptionalTensor& row_scale,
                                  const Tensor& weight, const Tensor& bias, double eps) {
  check_rows(x_in, x_in.size(-1), row_scale);
  TORCH_CHECK_VALUE(x_in.numel() > 0 && weight.numel() == x_in.size(-1) && bias.numel() == x_in.size(-1),
                    "layer_norm_training wants rows of ", weight.numel(), " channels, got ", x_in.sizes());
  TORCH_CHECK_VALUE(!branch_in.has_value() ||
                        (branch_in->sizes() == x_in.sizes() && branch_in->scalar_type() == at::kBFloat16),
                    "the branch must be like x");
  const Tensor x = x_in.contiguous(), w = weight.to(at::kFloat).contiguous(), b = bias.to(at::kFloat).contiguous();
  const Tensor branch = branch_in.has_value() ? branch_in->contiguous() : Tensor();
  const Tensor y = new_like(x), sum = branch.defined() ? new_like(x) : x.new_empty({0});
  const int64_t rows = x.numel() / x.size(-1);
  const Tensor statistics = x.new_empty({rows, 2}, at::kFloat);
  LayerNorm norm = describe(x, w, row_scale, statistics);
  norm.eps = eps, norm.bias = b.const_data_ptr<float>(), norm.y = y.mutable_data_ptr();
  if (branch.defined()) norm.branch = branch.const_data_ptr(), norm.sum = sum.mutable_data_ptr();
  at::parallel_for(0, rows, kGrainRows, [&](int64_t begin, int64_t end) { kernels().layer_forward(norm, begin, end); });
  return {sum, y, statistics};
}

// dx, dbranch (empty where it is dx), dweight, dbias.
Four layer_norm_training_backward(const OptionalTensor& dsum_in, const Tensor& dy_in, const Tensor& sum_in,
                                  const Tensor& statistics, const Tensor& weight, const OptionalTensor& row_scale) {
  const Tensor x = sum_in.contiguous(), dy = dy_in.to(at::kBFloat16).contiguous(), dx = new_like(x);
  const Tensor w = weight.to(at::kFloat).contiguous();
  const Tensor dsum = dsum_in.has_value() ? dsum_in->to(at::kBFloat16).contiguous() : Tensor();
  const Tensor dbranch = row_scale.has_value() ? new_like(x) : x.new_empty({0});
  const int64_t channels = x.size(-1), rows = x.numel() / channels, slots = slots_of(rows);
  LayerNorm norm = describe(x, w, row_scale, statistics);
  norm.dy = dy.const_data_ptr(), norm.dx = dx.mutable_data_ptr();
  if (dsum.defined()) norm.dsum = dsum.const_data_ptr();
  if (row_scale.has_value()) norm.dbranch = dbranch.mutable_data_ptr();
  const Tensor partial = statistics.new_zeros({slots, 2, channels});
  float* sums = partial.mutable_data_ptr<float>();
  over_slots(rows, slots, [&](int64_t slot, int64_t begin, int64_t end) {
    float* mine = sums + slot * 2 * channels;
    kernels().layer_backward(norm, begin, end, mine, mine + channels);
  });
  for (int64_t slot = 1; slot < slots; slot++)
    for (int64_t i = 0; i < 2 * channels; i++) sums[i] += sums[slot * 2 * channels + i];
  return {dx, dbranch, partial[0][0].clone(), partial[0][1].clone()};
}

}  // namespace mambavision
