"""The mixer's short convolution over tokens, tokens-major, with its SiLU.

Owns the choice between the native kernels (CPU, `native/depthwise_conv.cpp`), Triton's (CUDA, `triton_conv.py`) and
plain PyTorch (everything else). What to call when:

- `conv_silu_split(xz, weight_x, weight_z)` for the published mixer: both branches of in_proj's output in one pass. The
  projection is read in place and its gradient is written as one tensor, so that nothing is split, joined or copied.
- `conv_silu_tokens(x, weight)` for one branch, and for the ablations (causal; without SiLU).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.native_build import load_native
from mambavision.ops.tracing import constant_when_traced, needs_plain_operators

TAPS = 3


def conv_silu_tokens(x: Tensor, weight: Tensor, *, causal: bool = False, silu: bool = True) -> Tensor:
    """y_t = silu(w_0 x_{t-1} + w_1 x_t + w_2 x_{t+1}) per channel, zeros beyond the ends, no bias.

    causal: the taps lie at t-2, t-1, t instead. silu=False: the convolution alone.

    Args:
        x: (b, L, c), channels contiguous; the other strides are free.
        weight: (c, 1, 3), as nn.Conv1d keeps it; any dtype, e.g. float32 beside bfloat16 tokens under autocast.

    Returns:
        (b, L, c), contiguous, in x's dtype. On the CPU products and sums are float32, and gradients are bitwise
        repeatable at any number of threads.

    Raises:
        ValueError: shapes that do not fit.
    """
    return _conv(x, [weight], causal, silu)[0]


def conv_silu_split(xz: Tensor, weight_x: Tensor, weight_z: Tensor) -> tuple[Tensor, Tensor]:
    """`conv_silu_tokens` on both halves of a projection: xz (b, L, c_x + c_z) -> x (b, L, c_x), z (b, L, c_z)."""
    x, z = _conv(xz, [weight_x, weight_z], False, True)
    return x, z


def conv_tokens_reference(x: Tensor, weight: Tensor, causal: bool, silu: bool) -> Tensor:
    """The same in plain PyTorch, in x's dtype: three shifted products, no transposes, fused by torch.compile."""
    first, second, third = weight.squeeze(1).to(x.dtype).unbind(1)
    padded = F.pad(x, (0, 0, 2, 0) if causal else (0, 0, 1, 1))
    tokens = x.shape[1]
    y = padded[:, :tokens] * first + padded[:, 1 : tokens + 1] * second + padded[:, 2 : tokens + 2] * third
    return F.silu(y) if silu else y


def _conv(x: Tensor, weights: list[Tensor], causal: bool, silu: bool) -> list[Tensor]:
    channels = [weight.shape[0] for weight in weights]
    if x.dim() != 3 or sum(channels) != x.shape[2] or any(w.shape[1:] != (1, TAPS) for w in weights):
        raise ValueError(
            f"the token convolution wants x (batch, tokens, channels) and weights (channels, 1, {TAPS}), got x "
            f"{tuple(x.shape)} and weights {', '.join(str(tuple(w.shape)) for w in weights)}"
        )
    has_kernels = x.dtype != torch.float64 and not needs_plain_operators()
    if has_kernels and x.device.type == "cpu" and _native_available():
        return torch.ops.mambavision.token_conv(x, weights, causal, silu)
    if has_kernels and x.device.type == "cuda" and silu and not causal and _triton_available():
        from mambavision.ops.triton_conv import conv_silu_tokens_triton

        # All branches in one launch, over one weight; the results are views.
        return list(conv_silu_tokens_triton(x, torch.cat(weights)).split(channels, dim=-1))
    parts = x.split(channels, dim=-1)
    return [conv_tokens_reference(part, weight, causal, silu) for part, weight in zip(parts, weights, strict=True)]


@constant_when_traced
def _native_available() -> bool:
    """Builds and loads the kernels at the first call; the build itself warns, once, if it fails."""
    if load_native() is None:
        return False
    _register_shapes()
    return True


@constant_when_traced
def _triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _register_shapes() -> None:
    """What torch.compile and torch.export know of the operators without running them."""

    @torch.library.register_fake("mambavision::token_conv_forward")
    def _(x, weights, causal, silu):
        return [x.new_empty((x.shape[0], x.shape[1], weight.shape[0])) for weight in weights]

    @torch.library.register_fake("mambavision::token_conv_backward")
    def _(dys, x, weights, causal, silu):
        return x.new_empty(x.shape), [weight.new_empty(weight.shape) for weight in weights]
