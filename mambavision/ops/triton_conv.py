"""The mixer's short convolution over tokens with its SiLU on CUDA: one Triton kernel each way, custom op and rules.

Depthwise, kernel 3, 'same' zero padding, no bias, tokens-major. Each way reads and writes every value once (the
neighbouring tokens come from cache) and never transposes; the backward keeps only x and convolves again.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16
CHANNELS = 64
WARPS = 4
ROWS_PER_PROGRAM = 4  # windows whose weight gradients are added up before they are written
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def conv_silu_tokens_triton(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depthwise convolution over tokens. x (b, L, c), rows and tokens at any stride; weight (c, 1, 3).

    Returns (b, L, c), contiguous, in x's dtype (float32, bfloat16 or float16; computed in float32). The gradients are
    bitwise repeatable. Cannot be differentiated twice.
    """
    if x.device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"the Triton convolution runs on CUDA tensors, this one is on {x.device}; "
            "use depthwise_conv.conv_silu_tokens"
        )
    if x.dim() != 3 or weight.shape != (x.shape[2], 1, 3):
        raise ValueError(
            f"conv_silu_tokens wants x (b, L, c) and weight (c, 1, 3), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"the Triton convolution takes float32, bfloat16 and float16, got {x.dtype}; "
            "use depthwise_conv.conv_silu_tokens"
        )
    return torch.ops.mambavision.triton_conv_silu_forward(x, weight.float())


@triton.jit
def _load_token(x_ptr, token, stride_token, channel, length, channels):
    """(TOKENS, CHANNELS) at these tokens in float32; 0 outside the sequence."""
    inside = (token >= 0) & (token < length)
    mask = inside[:, None] & (channel < channels)[None, :]
    return tl.load(x_ptr + token[:, None] * stride_token + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def conv_forward_kernel(
    x_ptr, weight_ptr, y_ptr, length, channels, stride_x_row, stride_x_token,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, token blocks, channel blocks)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_width = channel < channels
    x_row = x_ptr + row * stride_x_row
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for tap in tl.static_range(3):
        w = tl.load(weight_ptr + channel * 3 + tap, mask=in_width, other=0.0)
        total += w[None, :] * _load_token(x_row, token + (tap - 1), stride_x_token, channel, length, channels)
    y = total * tl.sigmoid(total)
    mask = (token < length)[:, None] & in_width[None, :]
    y_row = y_ptr + row * length * channels
    tl.store(y_row + token[:, None] * channels + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, weight_sum_ptr, rows, length, channels, rows_per_program,
    stride_dy_row, stride_dy_token, stride_x_row, stride_x_token, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of dweight (row group x token block, tap, channel). Grid: (row groups, ..., ...)."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_width = channel < channels
    w0 = tl.load(weight_ptr + channel * 3, mask=in_width, other=0.0)[None, :]
    w1 = tl.load(weight_ptr + channel * 3 + 1, mask=in_width, other=0.0)[None, :]
    w2 = tl.load(weight_ptr + channel * 3 + 2, mask=in_width, other=0.0)[None, :]
    dw0 = tl.zeros([TOKENS, CHANNELS], tl.float32)
    dw1 = tl.zeros([TOKENS, CHANNELS], tl.float32)
    dw2 = tl.zeros([TOKENS, CHANNELS], tl.float32)
    first_row = tl.program_id(0) * rows_per_program
    for row_index in range(0, tl.minimum(rows_per_program, rows - first_row)):
        row = first_row.to(tl.int64) + row_index
        x_row, dy_row = x_ptr + row * stride_x_row, dy_ptr + row * stride_dy_row
        x_m2 = _load_token(x_row, token - 2, stride_x_token, channel, length, channels)
        x_m1 = _load_token(x_row, token - 1, stride_x_token, channel, length, channels)
        x_0 = _load_token(x_row, token, stride_x_token, channel, length, channels)
        x_p1 = _load_token(x_row, token + 1, stride_x_token, channel, length, channels)
        x_p2 = _load_token(x_row, token + 2, stride_x_token, channel, length, channels)
        # The gradient before the SiLU at the token before, here, and the token after; dy = 0 outside makes it 0 there.
        g_m1 = _load_token(dy_row, token - 1, stride_dy_token, channel, length, channels)
        g_m1 *= _silu_slope(w0 * x_m2 + w1 * x_m1 + w2 * x_0)
        g_0 = _load_token(dy_row, token, stride_dy_token, channel, length, channels)
        g_0 *= _silu_slope(w0 * x_m1 + w1 * x_0 + w2 * x_p1)
        g_p1 = _load_token(dy_row, token + 1, stride_dy_token, channel, length, channels)
        g_p1 *= _silu_slope(w0 * x_0 + w1 * x_p1 + w2 * x_p2)
        dx = w0 * g_p1 + w1 * g_0 + w2 * g_m1
        mask = (token < length)[:, None] & in_width[None, :]
        offset = row * length * channels + token[:, None] * channels + channel[None, :]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw0 += g_0 * x_m1
        dw1 += g_0 * x_0
        dw2 += g_0 * x_p1
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    sums = weight_sum_ptr + program * 3 * channels + channel
    tl.store(sums, tl.sum(dw0, 0), mask=in_width)
    tl.store(sums + channels, tl.sum(dw1, 0), mask=in_width)
    tl.store(sums + 2 * channels, tl.sum(dw2, 0), mask=in_width)


@triton.jit
def _silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


# Triton decides at import, by TRITON_INTERPRET, whether kernels are compiled for a GPU or interpreted on any device.
_INTERPRETED = not isinstance(conv_forward_kernel, triton.JITFunction)


@torch.library.custom_op("mambavision::triton_conv_silu_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = _dense_last(x), weight.contiguous()
    rows, length, channels = x.shape
    y = _forward_fake(x, weight)
    if y.numel() == 0:
        return y
    grid = (rows, triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS))
    with _on(x.device):
        conv_forward_kernel[grid](
            x, weight, y, length, channels, x.stride(0), x.stride(1), TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=WARPS
        )
    return y


@_forward.register_fake
def _forward_fake(x, weight):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("mambavision::triton_conv_silu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, weight = _dense_last(dy), _dense_last(x), weight.contiguous()
    rows, length, channels = x.shape
    dx, dweight = _backward_fake(dy, x, weight)
    if dx.numel() == 0:
        return dx, dweight.zero_()
    grid = (triton.cdiv(rows, ROWS_PER_PROGRAM), triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS))
    weight_sums = weight.new_empty(grid[0] * grid[1], 3, channels)
    with _on(x.device):
        conv_backward_kernel[grid](
            dy, x, weight, dx, weight_sums, rows, length, channels, ROWS_PER_PROGRAM,
            dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    dweight.copy_(weight_sums.sum(0).t().unsqueeze(1))
    return dx, dweight


@_backward.register_fake
def _backward_fake(dy, x, weight):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):
    return torch.ops.mambavision.triton_conv_silu_backward(dy, *ctx.saved_tensors)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "the Triton convolution cannot be differentiated twice (create_graph=True went through it); "
        "write it as torch.nn.functional.conv1d for second derivatives"
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_refuse_second_derivative)


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
