// The selective scan's operators: checks, parallel split, reductions in a fixed order.
//
//   selective_scan   what Python calls; differentiable; brings mixed dtypes (autocast) to what the kernels take
//   scan_forward     output and, where a gradient is needed, the state before each tile of tokens
//   scan_backward    all gradients; itself not differentiable
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>

#include "isa.h"
#include "operators.h"
#include "parallel_items.h"
#include "scan_kernel.h"

namespace mambavision {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

bool is_supported(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) == 1 ? tensor : tensor.contiguous();
}

void check_inputs(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                  const OptionalTensor& D, const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(u.dim() == 3, "u must be (batch, tokens, channels), got ", u.sizes());
  TORCH_CHECK_VALUE(delta.sizes() == u.sizes(), "delta ", delta.sizes(), " must have u's shape ", u.sizes());
  TORCH_CHECK_VALUE(A.dim() == 2 && A.size(0) == u.size(2) && A.size(1) > 0, "A must be (channels, states) with ",
                    u.size(2), " channels, got ", A.sizes());
  for (const Tensor* states : {&B, &C})
    TORCH_CHECK_VALUE(states->dim() == 3 && states->size(0) == u.size(0) && states->size(1) == u.size(1) &&
                          states->size(2) == A.size(1),
                      "B and C must be (batch, tokens, states) = (", u.size(0), ", ", u.size(1), ", ", A.size(1),
                      "), got ", states->sizes());
  for (const OptionalTensor* parameter : {&D, &bias})
    TORCH_CHECK_VALUE(!parameter->has_value() || ((*parameter)->dim() == 1 && (*parameter)->size(0) == u.size(2)),
                      "D and delta_bias must be (channels) = (", u.size(2), ")");
  TORCH_CHECK_VALUE(is_supported(u.scalar_type()) && delta.scalar_type() == u.scalar_type() &&
                        is_supported(B.scalar_type()) && C.scalar_type() == B.scalar_type(),
                    "the CPU scan takes float32 or bfloat16, got u ", u.scalar_type(), ", delta ", delta.scalar_type(),
                    ", B ", B.scalar_type(), ", C ", C.scalar_type(), "; for others use scan_backend=reference");
  for (const Tensor* tensor : {&u, &delta, &B, &C})
    TORCH_CHECK_VALUE(tensor->device().is_cpu(), "the CPU scan got a tensor on ", tensor->device());
}

// The parameters as the kernels want them: transposed, padded, A in units of log2.
struct PaddedParameters {
  PaddedParameters(const Tensor& A, const OptionalTensor& D, const OptionalTensor& bias, int64_t states, int64_t channels)
      : storage(A.new_zeros({states + 3, channels}, at::kFloat)),
        values(storage.data_ptr<float>()),
        columns(channels) {
    const Tensor A_float = A.to(at::kFloat).contiguous();
    const float* from = A_float.const_data_ptr<float>();
    for (int64_t d = 0; d < A.size(0); d++) {
      float largest = 0.0f;
      for (int64_t n = 0; n < A.size(1); n++) {
        const float scaled = from[d * A.size(1) + n] * 1.44269504f;
        values[n * channels + d] = scaled;
        const float magnitude = std::fabs(scaled);
        if (!std::isnan(largest) && !(magnitude <= largest)) largest = magnitude;  // a NaN counts as the largest
      }
      values[states * channels + d] = largest;
    }
    copy_in(D, states + 1);
    copy_in(bias, states + 2);
  }

  const float* row(int64_t index) const { return values + index * columns; }

 private:
  void copy_in(const OptionalTensor& parameter, int64_t row) {
    if (!parameter.has_value()) return;
    const Tensor contiguous = parameter->to(at::kFloat).contiguous();
    std::memcpy(values + row * columns, contiguous.const_data_ptr<float>(), contiguous.numel() * sizeof(float));
  }

  Tensor storage;  // aligned to a cache line, unlike a std::vector: an unaligned vector load costs two
  float* values;
  int64_t columns;
};

ScanProblem describe(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C) {
  ScanProblem p{};
  p.batch = u.size(0), p.tokens = u.size(1), p.channels = u.size(2), p.states = A.size(1);
  p.tiles = divide_up(p.tokens, kTileTokens);
  p.padded_states = round_up(p.states, kStatePad);
  p.padded_channels = round_up(p.channels, kChannelPad);
  p.channels_are_bfloat16 = u.scalar_type() == at::kBFloat16;
  p.states_are_bfloat16 = B.scalar_type() == at::kBFloat16;
  p.u = rows_of(u), p.delta = rows_of(delta), p.B = rows_of(B), p.C = rows_of(C);
  return p;
}

void attach(ScanProblem& p, const PaddedParameters& parameters) {
  p.A_log2e = parameters.row(0);
  p.A_magnitude = parameters.row(p.padded_states);
  p.D = parameters.row(p.padded_states + 1);
  p.bias = parameters.row(p.padded_states + 2);
}

const ScanKernels& kernels() {
  return ISA_TABLE(scan_kernels);
}

Range part(int64_t size, int64_t parts, int64_t index) { return {index * size / parts, (index + 1) * size / parts}; }

}  // namespace

Two scan_forward(const Tensor& u_in, const Tensor& delta_in, const Tensor& A, const Tensor& B_in, const Tensor& C_in,
                 const OptionalTensor& D, const OptionalTensor& bias, bool keep_states) {
  check_inputs(u_in, delta_in, A, B_in, C_in, D, bias);
  const Tensor u = with_contiguous_rows(u_in), delta = with_contiguous_rows(delta_in);
  const Tensor B = with_contiguous_rows(B_in), C = with_contiguous_rows(C_in);
  ScanProblem p = describe(u, delta, A, B, C);
  Tensor y = u.new_empty({p.batch, p.tokens, p.channels});
  const int64_t kept = keep_states ? std::max<int64_t>(p.tiles - 1, 0) : 0;
  Tensor checkpoints = u.new_empty({p.batch, kept, p.padded_states, p.padded_channels}, at::kFloat);
  if (y.numel() == 0) return {y, checkpoints};
  const PaddedParameters parameters(A, D, bias, p.padded_states, p.padded_channels);
  attach(p, parameters);
  p.y = rows_of(y);
  p.checkpoints = kept > 0 ? checkpoints.data_ptr<float>() : nullptr;

  // Sequences are independent, and so are channels within one: the split changes no result.
  const int64_t blocks = divide_up(p.channels, kernels().lanes);
  const int64_t written = blocks * kernels().lanes;
  // Rows are padded for the widest vectors; what narrower ones leave out is nobody's input, but part of the result.
  if (written < p.padded_channels) checkpoints.narrow(3, written, p.padded_channels - written).zero_();
  const int64_t splits = std::min(blocks, divide_up(4 * at::get_num_threads(), p.batch));
  parallel_items(p.batch * splits, [&](int64_t item) {
    kernels().forward(p, item / splits, part(blocks, splits, item % splits));
  });
  return {y, checkpoints};
}

namespace {

// Work is cut by the problem's size alone, never by the number of threads: sums then come out bit for bit the same.
constexpr int64_t kBatchSlots = 128;    // at most so many partial sums of the parameters' gradients
constexpr int64_t kWorkItems = 32;      // below so many sequences, a sequence's channels are split as well
constexpr int64_t kGroupChannels = 32;  // into groups of at least so many channels

// Adds `parts` arrays of `size` floats that lie one after the other, in order, into the first.
void sum_parts(float* values, int64_t parts, int64_t size) {
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t k = 1; k < parts; k++)
      for (int64_t i = begin; i < end; i++) values[i] += values[k * size + i];
  });
}

Tensor copy_of(const Tensor& tensor, at::ScalarType type = at::kFloat) {
  return tensor.new_empty(tensor.sizes(), type).copy_(tensor);
}

}  // namespace

Seven scan_backward(const Tensor& dy_in, const Tensor& u_in, const Tensor& delta_in, const Tensor& A,
                    const Tensor& B_in, const Tensor& C_in, const OptionalTensor& D, const OptionalTensor& bias,
                    const Tensor& checkpoints) {
  check_inputs(u_in, delta_in, A, B_in, C_in, D, bias);
  TORCH_CHECK_VALUE(dy_in.sizes() == u_in.sizes(), "the gradient ", dy_in.sizes(), " must have u's shape ",
                    u_in.sizes());
  const Tensor u = with_contiguous_rows(u_in), delta = with_contiguous_rows(delta_in);
  const Tensor B = with_contiguous_rows(B_in), C = with_contiguous_rows(C_in);
  const Tensor dy = with_contiguous_rows(dy_in.to(u.scalar_type()));
  ScanProblem p = describe(u, delta, A, B, C);
  Tensor du = u.new_empty({p.batch, p.tokens, p.channels});
  Tensor ddelta = u.new_empty({p.batch, p.tokens, p.channels});
  const int64_t N = p.padded_states;
  const int64_t slots = std::clamp<int64_t>(p.batch, 1, kBatchSlots);
  const int64_t groups = std::clamp<int64_t>(divide_up(kWorkItems, std::max<int64_t>(p.batch, 1)), 1,
                                             divide_up(std::max<int64_t>(p.channels, 1), kGroupChannels));
  Tensor dB_dC = u.new_empty({groups, p.batch, p.tokens, 2, N}, at::kFloat);
  Tensor dparameters = u.new_empty({slots, N + 2, p.padded_channels}, at::kFloat);
  if (u.numel() == 0) {
    dB_dC.zero_(), dparameters.zero_();
  } else {
    const PaddedParameters parameters(A, D, bias, p.padded_states, p.padded_channels);
    attach(p, parameters);
    p.dy = rows_of(dy), p.du = rows_of(du), p.ddelta = rows_of(ddelta);
    p.checkpoints = p.tiles > 1 ? checkpoints.data_ptr<float>() : nullptr;
    p.dB_dC = dB_dC.data_ptr<float>();
    p.dparameters = dparameters.data_ptr<float>();
    const int64_t lanes = kernels().lanes;
    parallel_items(slots * groups, [&](int64_t item) {
      const int64_t slot = item / groups, group = item % groups;
      // Groups are cut at multiples of the widest vector, so that every instruction set has the same ones.
      const Range wide = part(p.padded_channels / kChannelPad, groups, group);
      const Range blocks = {wide.begin * kChannelPad / lanes,
                            std::min(wide.end * kChannelPad / lanes, divide_up(p.channels, lanes))};
      ISA_TABLE(scan_backward_kernel).run(p, slot, part(p.batch, slots, slot), group, blocks);
    });
    sum_parts(p.dB_dC, groups, p.batch * p.tokens * 2 * N);
    sum_parts(p.dparameters, slots, (N + 2) * p.padded_channels);
  }
  // Copies, since an operator's outputs may not share memory.
  const Tensor per_token = dB_dC.select(0, 0), per_channel = dparameters.select(0, 0);
  auto parameter_gradient = [&](int64_t row) { return copy_of(per_channel.select(0, row).narrow(0, 0, p.channels)); };
  auto states_gradient = [&](int64_t which) {
    return copy_of(per_token.select(2, which).narrow(2, 0, p.states), B.scalar_type());
  };
  return {du,
          ddelta,
          copy_of(per_channel.narrow(0, 0, p.states).narrow(1, 0, p.channels).t()),
          states_gradient(0),
          states_gradient(1),
          parameter_gradient(N),
          parameter_gradient(N + 1)};
}

// All threads evaluate exponentials as the scan does, from registers and first-level cache; how many they did together.
int64_t scan_exponentials(int64_t per_thread) {
  std::atomic<int64_t> total{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) total += kernels().exponentials(per_thread);
  });
  return total;
}

namespace {

OptionalTensor as_float(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->to(at::kFloat)) : std::nullopt;
}

}  // namespace

// Autocast leaves what comes from a linear layer in bfloat16 and the parameters in float32; other mixtures are brought
// to the wider type here, where autograd sees it, and never narrowed.
Tensor selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                      const OptionalTensor& D, const OptionalTensor& bias) {
  auto common = [](const Tensor& a, const Tensor& b) {
    const bool narrow = a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16;
    return narrow ? at::kBFloat16 : at::kFloat;
  };
  for (const Tensor* tensor : {&u, &delta, &A, &B, &C})
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat || tensor->scalar_type() == at::kBFloat16 ||
                          tensor->scalar_type() == at::kHalf,
                      "the CPU scan takes float32, bfloat16 or float16, got ", tensor->scalar_type(),
                      "; use scan_backend=reference");
  const auto channel_type = common(u, delta), state_type = common(B, C);
  const Tensor u_ = u.to(channel_type), delta_ = delta.to(channel_type), A_ = A.to(at::kFloat);
  const Tensor B_ = B.to(state_type), C_ = C.to(state_type);
  const Tensor y = differentiable_scan(u_, delta_, A_, B_, C_, as_float(D), as_float(bias));
  return y.to(u.scalar_type());
}

}  // namespace mambavision
