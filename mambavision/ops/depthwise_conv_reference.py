"""The mixer's short convolution over tokens in plain PyTorch, tokens-major: no transposes, three shifted products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv_silu_tokens_reference(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depthwise convolution over tokens: kernel 3, 'same' zero padding, no bias.

    Args:
        x: (b, L, c), last dimension contiguous.
        weight: (c, 1, 3), as nn.Conv1d keeps it.

    Returns:
        (b, L, c), contiguous, in x's dtype.
    """
    before, here, after = weight.squeeze(1).to(x.dtype).unbind(1)
    padded = F.pad(x, (0, 0, 1, 1))
    return F.silu(padded[:, :-2] * before + x * here + padded[:, 2:] * after)
