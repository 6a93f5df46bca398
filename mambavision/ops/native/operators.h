// The functions behind the torch operators of training and of the scan. operators.cpp gives them their schemas,
// autograd.cpp their derivatives; each is explained where it is defined.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace mambavision {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Uninitialised, laid out as a dense tensor. New tensors are made by methods of others throughout: ATen/ops/empty.h and
// its kind include so much that a file compiles twice as long.
inline Tensor new_like(const Tensor& dense) { return dense.new_empty_strided(dense.sizes(), dense.strides()); }

// scan.cpp
Tensor selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                      const OptionalTensor& D, const OptionalTensor& bias);
Two scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                 const OptionalTensor& D, const OptionalTensor& bias, bool keep_states);
Seven scan_backward(const Tensor& dy, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                    const Tensor& C, const OptionalTensor& D, const OptionalTensor& bias, const Tensor& checkpoints);
int64_t scan_exponentials(int64_t per_thread);

// depthwise_conv.cpp
std::vector<Tensor> token_conv(const Tensor& x, TensorList weights, bool causal, bool silu);
std::vector<Tensor> token_conv_forward(const Tensor& x, TensorList weights, bool causal, bool silu);
std::tuple<Tensor, std::vector<Tensor>> token_conv_backward(TensorList dys, const Tensor& x, TensorList weights,
                                                            bool causal, bool silu);

// gelu.cpp
Tensor gelu_forward(const Tensor& x, bool tanh_form);
Tensor gelu_backward(const Tensor& dy, const Tensor& x, bool tanh_form);

// linear_training.cpp, where there are matrix units
Tensor linear_training_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Three linear_training_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool has_bias, bool wants_dx);
Three mlp_training_forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2);
Five mlp_training_backward(const Tensor& dy, const Tensor& x, const Tensor& hidden, const Tensor& derivative,
                           const Tensor& w1, const Tensor& w2);

// attention_training.cpp, where there are matrix units
Two attention_training_forward(const Tensor& qkv, int64_t heads);
Tensor attention_training_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& log_sums,
                                   int64_t heads);

// norm_training.cpp
Two batch_norm_training_forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                const OptionalTensor& running_mean, const OptionalTensor& running_var, double momentum,
                                double eps, int64_t activation, const OptionalTensor& residual,
                                const OptionalTensor& row_scale);
Three batch_norm_training_backward(const Tensor& dy, const Tensor& x, const Tensor& constants, int64_t activation,
                                   const OptionalTensor& row_scale);
Three layer_norm_training_forward(const Tensor& x, const OptionalTensor& branch, const OptionalTensor& row_scale,
                                  const Tensor& weight, const Tensor& bias, double eps);
Four layer_norm_training_backward(const OptionalTensor& dsum, const Tensor& dy, const Tensor& sum,
                                  const Tensor& statistics, const Tensor& weight, const OptionalTensor& row_scale);

// optimizer.cpp
Tensor global_norm(TensorList tensors);
void lamb_step(TensorList parameters, TensorList gradients, TensorList first_moments, TensorList second_moments,
               double gradient_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
               double correction1, double correction2);
void ema_update(TensorList averages, TensorList values, double weight);

// autograd.cpp: the same forwards, differentiable.
Tensor differentiable_scan(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                           const OptionalTensor& D, const OptionalTensor& bias);
Seven differentiable_scan_backward(const Tensor& dy, const Tensor& u, const Tensor& delta, const Tensor& A,
                                   const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                   const OptionalTensor& bias, const Tensor& checkpoints);
std::vector<Tensor> differentiable_token_conv(const Tensor& x, TensorList weights, bool causal, bool silu);
Tensor gelu(const Tensor& x, bool tanh_form);
Tensor linear_training(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Tensor mlp_training(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2);
Tensor attention_training(const Tensor& qkv, int64_t heads);
Tensor batch_norm_training(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, double momentum, double eps, int64_t activation,
                           const OptionalTensor& residual, const OptionalTensor& row_scale);
Two layer_norm_training(const Tensor& x, const OptionalTensor& branch, const OptionalTensor& row_scale,
                        const Tensor& weight, const Tensor& bias, double eps);

}  // namespace mambavision
