// The operators of the mixer's convolutions over tokens: checks, parallel split, sums in a fixed order.
// One call convolves all branches of a projection's output, x and z: it is read in place, and its gradient comes back as
// one tensor, with no copy to split the one or to join the other.
//
//   token_conv            what Python calls; differentiable
//   token_conv_forward    one contiguous output per branch
//   token_conv_backward   the gradient of the input and of every branch's taps; itself not differentiable
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "depthwise_conv_kernel.h"
#include "isa.h"
#include "operators.h"

namespace mambavision {
namespace {

// Work is cut by the problem's size alone, never by the number of threads: sums then come out bit for bit the same.
constexpr int64_t kTileTokens = 256;  // a sequence is cut into equal tiles of at most so many tokens
constexpr int64_t kSlots = 64;        // at most so many partial sums of the taps' gradients
constexpr int64_t kChannelPad = 32;   // taps are padded to a multiple of this, the widest block of channels

const TokenConvKernels& kernels() { return ISA_TABLE(token_conv_kernels); }

bool is_supported(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

TokenRange part(int64_t size, int64_t parts, int64_t index) {
  return {index * size / parts, (index + 1) * size / parts};
}

void check_inputs(const Tensor& x, TensorList weights) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must be (batch, tokens, channels), got ", x.sizes());
  TORCH_CHECK_VALUE(is_supported(x.scalar_type()), "the CPU token convolution takes float32 or bfloat16, got ",
                    x.scalar_type());
  int64_t channels = 0;
  for (const Tensor& weight : weights) {
    TORCH_CHECK_VALUE(weight.dim() == 3 && weight.size(1) == 1 && weight.size(2) == kTaps,
                      "a weight must be (channels, 1, ", kTaps, "), got ", weight.sizes());
    TORCH_CHECK_VALUE(weight.device().is_cpu(), "the CPU token convolution got a weight on ", weight.device());
    channels += weight.size(0);
  }
  TORCH_CHECK_VALUE(channels == x.size(2), "the weights have ", channels, " channels together, x has ", x.size(2));
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) == 1 ? tensor : tensor.contiguous();
}

TokenRows rows_of(const Tensor& tensor, int64_t channel = 0) {
  return {static_cast<char*>(tensor.data_ptr()) + channel * tensor.element_size(), tensor.stride(0), tensor.stride(1)};
}

// The branches of x, one convolution each, and their taps transposed and padded.
struct Branches {
  Branches(const Tensor& x, TensorList weights, bool causal, bool silu) {
    for (const Tensor& weight : weights) {
      const int64_t channels = weight.size(0), padded = divide_up(channels, kChannelPad) * kChannelPad;
      convs.push_back({x.size(1), channels, causal ? -kTaps + 1 : -1, silu, x.scalar_type() == at::kBFloat16, nullptr,
                       padded, rows_of(x, total_channels)});
      first_channel.push_back(total_channels);
      first_tap.push_back(total_taps);
      total_channels += channels, total_taps += kTaps * padded;
    }
    taps.resize(total_taps, 0.0f);
    for (size_t k = 0; k < convs.size(); k++) {
      const Tensor weight = weights[k].to(at::kFloat).contiguous();
      const float* from = weight.const_data_ptr<float>();
      convs[k].taps = taps.data() + first_tap[k];
      for (int64_t c = 0; c < convs[k].channels; c++)
        for (int tap = 0; tap < kTaps; tap++)
          taps[first_tap[k] + tap * convs[k].tap_stride + c] = from[c * kTaps + tap];
    }
  }

  std::vector<TokenConv> convs;
  std::vector<int64_t> first_channel, first_tap;
  std::vector<float> taps;
  int64_t total_channels = 0, total_taps = 0;
};

}  // namespace

std::vector<Tensor> token_conv_forward(const Tensor& x_in, TensorList weights, bool causal, bool silu) {
  check_inputs(x_in, weights);
  const Tensor x = with_contiguous_rows(x_in);
  Branches branches(x, weights, causal, silu);
  std::vector<Tensor> outputs;
  for (TokenConv& conv : branches.convs) {
    outputs.push_back(x.new_empty({x.size(0), x.size(1), conv.channels}));
    conv.y = rows_of(outputs.back());
  }
  const int64_t tiles = divide_up(x.size(1), kTileTokens);
  at::parallel_for(0, x.size(0) * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++)
      for (const TokenConv& conv : branches.convs)
        kernels().forward(conv, item / tiles, part(x.size(1), tiles, item % tiles));
  });
  return outputs;
}

std::tuple<Tensor, std::vector<Tensor>> token_conv_backward(TensorList dys_in, const Tensor& x_in, TensorList weights,
                                                            bool causal, bool silu) {
  check_inputs(x_in, weights);
  TORCH_CHECK(dys_in.size() == weights.size(), "token_conv_backward wants one gradient per branch");
  const Tensor x = with_contiguous_rows(x_in);
  Branches branches(x, weights, causal, silu);
  const Tensor dx = x.new_empty(x.sizes());
  std::vector<Tensor> dys;
  for (size_t k = 0; k < branches.convs.size(); k++) {
    TORCH_CHECK(dys_in[k].dim() == 3 && dys_in[k].size(0) == x.size(0) && dys_in[k].size(1) == x.size(1) &&
                    dys_in[k].size(2) == weights[k].size(0),
                "gradient ", k, " has shape ", dys_in[k].sizes());
    dys.push_back(with_contiguous_rows(dys_in[k].to(x.scalar_type())));
    branches.convs[k].dy = rows_of(dys.back());
    branches.convs[k].dx = rows_of(dx, branches.first_channel[k]);
  }

  const int64_t tiles = divide_up(x.size(1), kTileTokens), items = x.size(0) * tiles;
  const int64_t slots = std::clamp<int64_t>(items, 1, kSlots);
  std::vector<float> sums(slots * branches.total_taps, 0.0f);
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; slot++) {
      const TokenRange mine = part(items, slots, slot);
      for (int64_t item = mine.begin; item < mine.end; item++)
        for (size_t k = 0; k < branches.convs.size(); k++)
          kernels().backward(branches.convs[k], item / tiles, part(x.size(1), tiles, item % tiles),
                             sums.data() + slot * branches.total_taps + branches.first_tap[k]);
    }
  });
  for (int64_t slot = 1; slot < slots; slot++)
    for (int64_t i = 0; i < branches.total_taps; i++) sums[i] += sums[slot * branches.total_taps + i];

  std::vector<Tensor> dweights;
  for (size_t k = 0; k < branches.convs.size(); k++) {
    const TokenConv& conv = branches.convs[k];
    const Tensor gradient = x.new_empty({conv.channels, 1, kTaps}, at::kFloat);
    float* to = gradient.mutable_data_ptr<float>();
    for (int64_t c = 0; c < conv.channels; c++)
      for (int tap = 0; tap < kTaps; tap++)
        to[c * kTaps + tap] = sums[branches.first_tap[k] + tap * conv.tap_stride + c];
    dweights.push_back(gradient.to(weights[k].scalar_type()));
  }
  return {dx, dweights};
}

// float16 is brought to float32 and back: CPUs of today compute in neither bfloat16 nor float16 here.
std::vector<Tensor> token_conv(const Tensor& x_in, TensorList weights, bool causal, bool silu) {
  TORCH_CHECK_VALUE(is_supported(x_in.scalar_type()) || x_in.scalar_type() == at::kHalf,
                    "the CPU token convolution takes float32, bfloat16 or float16, got ", x_in.scalar_type());
  const Tensor x = x_in.scalar_type() == at::kHalf ? x_in.to(at::kFloat) : x_in;
  std::vector<Tensor> outputs = differentiable_token_conv(x, weights, causal, silu);
  for (Tensor& output : outputs) output = output.to(x_in.scalar_type());
  return outputs;
}

}  // namespace mambavision
