"""Fused 3x3 convolutions for inference in bfloat16 on CPUs: how filters are packed, and whether they can run here.

The operators are in `native/conv_inference.cpp`; `models/packed_conv.py` makes modules of them.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.token_inference import PANEL_COLUMNS, matrix_units_available

_PIXEL_PAD, _SMALL_PIXEL = 32, 8  # kPixelPad and kSmallPixel of the kernels


def conv_inference_available() -> bool:
    """Whether the compiled kernels are there and the processor has the matrix units they are for."""
    if not matrix_units_available():
        return False
    _register_shapes()
    return True


def pack_filter(weight: Tensor) -> Tensor:
    """A convolution's weight (out, in, 3, 3) as the matrix units read it: (blocks of 32 out, 9 padded in / 2, 64).

    Of a block of output channels the rows are (filter row, filter column, input channel), input channels zero-padded as
    the pixels are, and a pair of rows lies together. Three dimensions, as of four module.to(memory_format=channels_last)
    would change the order.
    """
    columns, channels = weight.shape[:2]
    pixel = _SMALL_PIXEL if channels <= _SMALL_PIXEL else channels + -channels % _PIXEL_PAD
    rows = F.pad(weight.detach().to(torch.bfloat16).permute(0, 2, 3, 1), (0, pixel - channels)).flatten(2)
    weight = F.pad(rows, (0, -rows.shape[2] % _PIXEL_PAD)).flatten(1)
    weight = F.pad(weight, (0, 0, 0, -columns % PANEL_COLUMNS))
    return weight.view(-1, PANEL_COLUMNS, weight.shape[1] // 2, 2).transpose(1, 2).flatten(2).contiguous()


@cache
def _register_shapes() -> None:
    """What torch.compile and torch.export know of the operators without running them."""

    @torch.library.register_fake("mambavision::conv_block_inference")
    def _(x, first, first_bias, second, second_bias):
        return torch.empty_like(x, memory_format=torch.channels_last)

    @torch.library.register_fake("mambavision::conv_inference")
    def _(x, filter, bias, stride, relu):
        height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
        y = x.new_empty((x.shape[0], bias.shape[0], height, width), dtype=torch.bfloat16)
        return y.contiguous(memory_format=torch.channels_last)
