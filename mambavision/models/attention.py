"""Multi-head self-attention over the tokens of a window; no mask, no position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (b, heads, L, head width)
        if tokens.device.type == "cpu" and torch.is_grad_enabled():
            # In training on a CPU, two matrix products beat the fused kernel, whose backward is slow there.
            scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
            mixed = scores.softmax(dim=-1, dtype=scores.dtype) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))
