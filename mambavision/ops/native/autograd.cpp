// The derivatives of the operators of operators.h: what a forward keeps and how a backward is called with it. All
// arithmetic is elsewhere. Both halves are called as operators, so that profilers and torch.compile see them.
//
// One file for all: custom_function.h alone takes several seconds to compile.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <initializer_list>

#include "operators.h"

// The operator behind a function of operators.h.
#define OPERATOR(function)                                                            \
  ([]() -> const auto& {                                                              \
    static const auto handle = c10::Dispatcher::singleton()                           \
                                   .findSchemaOrThrow("mambavision::" #function, "")  \
                                   .typed<decltype(function)>();                      \
    return handle;                                                                    \
  }())

namespace mambavision {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

bool any_requires_grad(std::initializer_list<OptionalTensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const auto& t) { return t.has_value() && t->requires_grad(); });
}

struct ScanFunction : Function<ScanFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, checkpoints] = OPERATOR(scan_forward).call(u, delta, A, B, C, D, bias, true);
    context->save_for_backward({u, delta, A, B, C, D.value_or(Tensor()), bias.value_or(Tensor()), checkpoints});
    return y;
  }
  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const variable_list saved = context->get_saved_variables();
    const OptionalTensor D = optional(saved[5]), bias = optional(saved[6]);
    auto [du, ddelta, dA, dB, dC, dD, dbias] = OPERATOR(scan_backward)
                                                   .call(dy[0], saved[0], saved[1], saved[2], saved[3], saved[4], D,
                                                         bias, saved[7]);
    return {du, ddelta, dA, dB, dC, D.has_value() ? dD : Tensor(), bias.has_value() ? dbias : Tensor()};
  }
};

// Lets first gradients through under create_graph=True, and says so when somebody differentiates them.
struct ScanBackwardFunction : Function<ScanBackwardFunction> {
  static variable_list forward(AutogradContext*, const Tensor& dy, const Tensor& u, const Tensor& delta, const Tensor& A,
                               const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias,
                               const Tensor& checkpoints) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [du, ddelta, dA, dB, dC, dD, dbias] =
        OPERATOR(scan_backward).call(dy, u, delta, A, B, C, D, bias, checkpoints);
    return {du, ddelta, dA, dB, dC, dD, dbias};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "the CPU selective scan has no second derivative (double backward); "
                "use scan_backend=reference, which is differentiable any number of times");
  }
};

// The same in PyTorch's operators, whose gradients have gradients.
variable_list plain_token_conv(const Tensor& x, TensorList weights, bool causal, bool silu) {
  const Tensor padded = at::constant_pad_nd(x, {0, 0, causal ? 2 : 1, causal ? 0 : 1});
  variable_list outputs;
  int64_t channel = 0;
  for (const Tensor& weight : weights) {
    const Tensor part = padded.narrow(2, channel, weight.size(0)), taps = weight.select(1, 0);
    Tensor y = part.narrow(1, 0, x.size(1)).mul(taps.select(1, 0));
    for (int64_t tap = 1; tap < taps.size(1); tap++) y = y.add(part.narrow(1, tap, x.size(1)).mul(taps.select(1, tap)));
    outputs.push_back((silu ? at::silu(y) : y).to(x.scalar_type()));
    channel += weight.size(0);
  }
  return outputs;
}

struct TokenConvFunction : Function<TokenConvFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& x, TensorList weights, bool causal, bool silu) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    context->save_for_backward(saved);
    context->saved_data["causal"] = causal;
    context->saved_data["silu"] = silu;
    return OPERATOR(token_conv_forward).call(x, weights, causal, silu);
  }
  static variable_list backward(AutogradContext* context, const variable_list& dys) {
    const variable_list saved = context->get_saved_variables();
    const TensorList weights(saved.data() + 1, saved.size() - 1);
    const bool causal = context->saved_data["causal"].toBool(), silu = context->saved_data["silu"].toBool();
    if (at::GradMode::is_enabled()) {  // create_graph=True
      variable_list wanted, gradients(saved.size() + 2);
      for (const Tensor& input : saved)
        if (input.requires_grad()) wanted.push_back(input);
      const variable_list found = torch::autograd::grad(plain_token_conv(saved[0], weights, causal, silu), wanted, dys,
                                                        /*retain_graph=*/true, /*create_graph=*/true);
      for (size_t i = 0, k = 0; i < saved.size(); i++)
        if (saved[i].requires_grad()) gradients[i] = found[k++];
      return gradients;
    }
    auto [dx, dweights] = OPERATOR(token_conv_backward).call(dys, saved[0], weights, causal, silu);
    variable_list gradients{dx};
    gradients.insert(gradients.end(), dweights.begin(), dweights.end());
    gradients.resize(gradients.size() + 2);  // none for the flags
    return gradients;
  }
};

struct GeluFunction : Function<GeluFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& x, bool tanh_form) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x});
    context->saved_data["tanh_form"] = tanh_form;
    return OPERATOR(gelu_forward).call(x, tanh_form);
  }
  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const Tensor x = context->get_saved_variables()[0];
    const bool tanh_form = context->saved_data["tanh_form"].toBool();
    if (at::GradMode::is_enabled())  // create_graph=True: PyTorch's own has a second derivative
      return {at::gelu_backward(dy[0], x, tanh_form ? "tanh" : "none"), Tensor()};
    return {OPERATOR(gelu_backward).call(dy[0], x, tanh_form), Tensor()};
  }
};

struct LinearFunction : Function<LinearFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    context->saved_data["has_bias"] = bias.has_value();
    context->saved_data["wants_dx"] = x.requires_grad();
    if (bias.has_value()) context->saved_data["bias_type"] = static_cast<int64_t>(bias->scalar_type());
    return OPERATOR(linear_training_forward).call(x, weight, bias);
  }
  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const variable_list saved = context->get_saved_variables();
    const bool has_bias = context->saved_data["has_bias"].toBool();
    const bool wants_dx = context->saved_data["wants_dx"].toBool();
    auto [dx, dweight, dbias] =
        OPERATOR(linear_training_backward).call(dy[0], saved[0], saved[1], has_bias, wants_dx);
    if (has_bias) dbias = dbias.to(static_cast<at::ScalarType>(context->saved_data["bias_type"].toInt()));
    return {wants_dx ? dx : Tensor(), dweight, has_bias ? dbias : Tensor()};
  }
};

struct MlpFunction : Function<MlpFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                        const Tensor& b2) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, hidden, derivative] = OPERATOR(mlp_training_forward).call(x, w1, b1, w2, b2);
    context->save_for_backward({x, hidden, derivative, w1, w2});
    context->saved_data["bias_type"] = static_cast<int64_t>(b1.scalar_type());
    return y;
  }
  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const variable_list saved = context->get_saved_variables();
    const auto type = static_cast<at::ScalarType>(context->saved_data["bias_type"].toInt());
    auto [dx, dw1, db1, dw2, db2] =
        OPERATOR(mlp_training_backward).call(dy[0], saved[0], saved[1], saved[2], saved[3], saved[4]);
    return {dx, dw1, db1.to(type), dw2, db2.to(type)};
  }
};

struct AttentionFunction : Function<AttentionFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& qkv, int64_t heads) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, log_sums] = OPERATOR(attention_training_forward).call(qkv, heads);
    context->save_for_backward({qkv, out, log_sums});
    context->saved_data["heads"] = heads;
    return out;
  }
  static variable_list backward(AutogradContext* context, const variable_list& dout) {
    const variable_list saved = context->get_saved_variables();
    const int64_t heads = context->saved_data["heads"].toInt();
    return {OPERATOR(attention_training_backward).call(dout[0], saved[0], saved[1], saved[2], heads), Tensor()};
  }
};

struct BatchNormFunction : Function<BatchNormFunction> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
                        double eps, int64_t activation, const OptionalTensor& residual, const OptionalTensor& row_scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, constants] =
        OPERATOR(batch_norm_training_forward)
            .call(x, weight, bias, running_mean, running_var, momentum, eps, activation, residual, row_scale);
    context->save_for_backward({x, constants, row_scale.value_or(Tensor()), weight});
    context->saved_data["activation"] = activation;
    context->saved_data["residual"] = residual.has_value();
    return y;
  }
  static variable_list backward(AutogradContext* context, const variable_list& dy) {
    const variable_list saved = context->get_saved_variables();
    const int64_t activation = context->saved_data["activation"].toInt();
    auto [dx, dweight, dbias] =
        OPERATOR(batch_norm_training_backward).call(dy[0], saved[0], saved[1], activation, optional(saved[2]));
    const auto type = saved[3].scalar_type();
    const Tensor none;
    return {dx, dweight.to(type), dbias.to(type), none, none, none, none, none,
            context->saved_data["residual"].toBool() ? dy[0] : none, none};
  }
};

struct LayerNormFunction : Function<LayerNormFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const OptionalTensor& branch,
                               const OptionalTensor& row_scale, const Tensor& weight, const Tensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [sum, y, statistics] = OPERATOR(layer_norm_training_forward).call(x, branch, row_scale, weight, bias, eps);
    context->save_for_backward({branch.has_value() ? sum : x, statistics, weight, row_scale.value_or(Tensor())});
    context->saved_data["branch"] = branch.has_value();
    context->set_materialize_grads(false);
    return {branch.has_value() ? sum : x, y};
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const bool branch = context->saved_data["branch"].toBool();
    const Tensor dy = gradients[1].defined() ? gradients[1] : saved[0].new_zeros(saved[0].sizes());
    auto [dx, dbranch, dweight, dbias] =
        OPERATOR(layer_norm_training_backward)
            .call(optional(gradients[0]), dy, saved[0], saved[1], saved[2], optional(saved[3]));
    const auto type = saved[2].scalar_type();
    const Tensor none;
    return {dx, branch ? (saved[3].defined() ? dbranch : dx) : none, none, dweight.to(type), dbias.to(type), none};
  }
};

}  // namespace

Tensor differentiable_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                           const OptionalTensor& D, const OptionalTensor& bias) {
  if (at::GradMode::is_enabled() && any_requires_grad({u, delta, A, B, C, D, bias}))
    return ScanFunction::apply(u, delta, A, B, C, D, bias);
  return std::get<0>(OPERATOR(scan_forward).call(u, delta, A, B, C, D, bias, false));
}

Seven differentiable_scan_backward(const Tensor& dy, const Tensor& u, const Tensor& delta, const Tensor& A,
                                   const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                   const OptionalTensor& bias, const Tensor& checkpoints) {
  auto g = ScanBackwardFunction::apply(dy, u, delta, A, B, C, D, bias, checkpoints);
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6]};
}

std::vector<Tensor> differentiable_token_conv(const Tensor& x, TensorList weights, bool causal, bool silu) {
  const bool wanted = x.requires_grad() ||
                      std::any_of(weights.begin(), weights.end(), [](const Tensor& w) { return w.requires_grad(); });
  if (at::GradMode::is_enabled() && wanted) return TokenConvFunction::apply(x, weights, causal, silu);
  return OPERATOR(token_conv_forward).call(x, weights, causal, silu);
}

Tensor gelu(const Tensor& x, bool tanh_form) {
  if (at::GradMode::is_enabled() && x.requires_grad()) return GeluFunction::apply(x, tanh_form);
  return OPERATOR(gelu_forward).call(x, tanh_form);
}

Tensor linear_training(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return LinearFunction::apply(x, weight, bias);
}

Tensor mlp_training(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  return MlpFunction::apply(x, w1, b1, w2, b2);
}

Tensor attention_training(const Tensor& qkv, int64_t heads) { return AttentionFunction::apply(qkv, heads); }

Tensor batch_norm_training(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, double momentum, double eps, int64_t activation,
                           const OptionalTensor& residual, const OptionalTensor& row_scale) {
  return BatchNormFunction::apply(x, weight, bias, running_mean, running_var, momentum, eps, activation, residual,
                                  row_scale);
}

Two layer_norm_training(const Tensor& x, const OptionalTensor& branch, const OptionalTensor& row_scale,
                        const Tensor& weight, const Tensor& bias, double eps) {
  const variable_list both = LayerNormFunction::apply(x, branch, row_scale, weight, bias, eps);
  return {both[0], both[1]};
}

}  // namespace mambavision
