"""Multi-head self-attention over the tokens of a window; no mask, no position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops.tracing import is_exported
from mambavision.ops.training import attention, linear


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head width)) v on (b, L, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        assert dim % num_heads == 0
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:  # (b, L, C) -> (b, L, C)
        batch, length, dim = tokens.shape
        qkv = linear(tokens, self.qkv)
        mixed = attention(qkv, self.num_heads)
        if mixed is None:
            qkv = qkv.view(batch, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
            if tokens.device.type == "cpu" and torch.is_grad_enabled() and not is_exported():
                mixed = attend_by_products(qkv)
            else:
                mixed = F.scaled_dot_product_attention(*qkv.unbind(0))  # each (b, heads, L, head width)
            mixed = mixed.transpose(1, 2).reshape(batch, length, dim)
        return linear(mixed, self.proj)


def attend_by_products(qkv: Tensor) -> Tensor:
    """Attention as two matrix products, (3, b, heads, L, head width) -> (b, heads, L, head width).

    In training on a CPU this takes a third of the fused kernel's time, whose backward is slow there. The three parts
    are brought into order by one copy, and the scale is part of the product.
    """
    _, batch, heads, length, width = qkv.shape
    q, k, v = qkv.reshape(3, batch * heads, length, width).unbind(0)
    scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    return torch.bmm(scores.softmax(dim=-1, dtype=scores.dtype), v).view(batch, heads, length, width)
