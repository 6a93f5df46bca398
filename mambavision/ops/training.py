"""The layers of a training step in bfloat16 on the CPU: native operators where they fit, PyTorch's elsewhere.

Owns the choice. The native ones take over where gradients are recorded and activations are bfloat16 (by autocast or as
they come): the normalisations (`native/norm_training.cpp`) on any processor, what consists of products
(`native/linear_training.cpp`, `native/attention_training.cpp`) where it has matrix units (AMX).
Float32, inference, other devices and every traced graph take PyTorch's own operators, which a compiler can fuse and an
export can name. Sums are float32 and bitwise repeatable at any number of threads; gradients of weights come in the
weights' type, not rounded to bfloat16 on the way.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops.native_build import load_native
from mambavision.ops.tracing import wants_plain_operators

_LONGEST_WINDOW = 320  # tokens
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu_tanh": 2}


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether its parameters say all of what calling it does.

    They do not where it was replaced or wrapped (LoRA, quantisation, parametrisations) or something hooks onto the call
    (pruning, sharding, counters of operations, captured activations): then it must be called.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """layer(x). x (..., in)."""
    if not is_plain(layer, nn.Linear):
        return layer(x)
    return product(x, layer.weight, layer.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x (..., in), weight (out, in), bias (out)."""
    native = _products_for(x)
    if native is None or weight.shape[0] % 2 or weight.shape[1] % 2 or weight.dtype == torch.float64:
        return F.linear(x, weight, bias)
    return native.linear_training(x.to(torch.bfloat16), weight, bias)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor | None:
    """second(gelu(first(x))) with the exact GELU, or None where it is the caller's to compute.

    Keeps the hidden activations and the derivative of the GELU, not its argument.
    """
    native = _products_for(x)
    if native is None or not is_plain(first, nn.Linear) or not is_plain(second, nn.Linear):
        return None
    if first.bias is None or second.bias is None or first.in_features % 2 or first.out_features % 2:
        return None
    return native.mlp_training(x.to(torch.bfloat16), first.weight, first.bias, second.weight, second.bias)


def attention(qkv: Tensor, num_heads: int) -> Tensor | None:
    """softmax(q k^T / sqrt(width)) v, or None where it is the caller's to compute.

    qkv (b, L, 3 heads width), a token's queries before its keys and values; returns (b, L, heads width). For windows: the
    scores of one head are to fit in a core's cache.
    """
    native = _products_for(qkv)
    if native is None or qkv.shape[1] > _LONGEST_WINDOW or qkv.shape[2] // (3 * num_heads) % 2:
        return None
    return native.attention_training(qkv.to(torch.bfloat16), num_heads)


def fuses_batch_norm(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None = None) -> bool:
    """Whether `batch_norm` takes these; norm has weights and moving statistics."""
    return (
        _norms_for(x) is not None
        and x.dtype == torch.bfloat16
        and (residual is None or residual.dtype == torch.bfloat16)
        and norm.running_mean.dtype == torch.float32
    )


def batch_norm(
    x: Tensor,
    norm: nn.BatchNorm2d,
    bias: Tensor,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    """activation(BN(x)), or residual + scale * BN(x), by this batch's statistics, which move the running ones.

    Args:
        x, residual: (B, C, H, W), as `fuses_batch_norm` wants them.
        bias: takes the place of norm.bias.
        activation: none | relu | gelu_tanh; only `none` beside a residual.
        drop_path_scale: (B,) float32.

    Returns:
        (B, C, H, W), bfloat16, channels-last.
    """
    return load_native().batch_norm_training(
        x,
        norm.weight,
        bias,
        norm.running_mean,
        norm.running_var,
        norm.momentum,
        norm.eps,
        _ACTIVATIONS[activation],
        residual,
        drop_path_scale,
    )


def fuses_layer_norm(x: Tensor, branch: Tensor | None, norm: nn.Module) -> bool:
    """Whether `add_layer_norm` takes these."""
    return (
        _norms_for(x) is not None
        and x.dtype == torch.bfloat16
        and (branch is None or branch.dtype == torch.bfloat16)
        and is_plain(norm, nn.LayerNorm)
    )


def add_layer_norm(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, drop_path_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = x + scale * branch (x itself without a branch) and LN(s). x, branch (b, L, C); drop_path_scale (b,) float32."""
    return load_native().layer_norm_training(x, branch, drop_path_scale, norm.weight, norm.bias, norm.eps)


def _products_for(x: Tensor) -> object | None:
    """The kernels, where x is theirs to take and there are matrix units for their products."""
    return _with_matrix_units() if _wants_native(x) else None


def _norms_for(x: Tensor) -> object | None:
    """The kernels, where x is theirs to take."""
    return load_native() if _wants_native(x) else None


def _wants_native(x: Tensor) -> bool:
    if wants_plain_operators() or x.device.type != "cpu" or not torch.is_grad_enabled() or x.numel() == 0:
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype != torch.float64
    return x.dtype == torch.bfloat16


@cache
def _with_matrix_units() -> object | None:
    native = load_native()
    return native if native is not None and native.matrix_units_available() else None
