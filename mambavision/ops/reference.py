"""The selective scan in plain PyTorch: the meaning of the operator, the oracle of the tests, and the export path.

Correct on any device and in any floating dtype, differentiable any number of times; slow, one step a token.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambavision.ops.tracing import needs_plain_operators

# Tokens whose (batch, channels, state) tensors live at once while training. Between chunks only the state is kept and
# the chunk is computed again in the backward, so that 12 544 tokens do not need 12 544 states.
CHUNK_TOKENS = 256


def scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t . h_t + D u_t;  dt = softplus(delta + delta_bias).

    Mamba (arXiv 2312.00752), algorithm 2, with its simplified (Euler) discretisation of B.

    Args:
        u, delta: (b, L, d).
        A: (d, n).  D, delta_bias: (d,) or None.
        B, C: (b, L, n).

    Returns:
        (b, L, d) in u's dtype. The state is float32, or float64 where u is, under autocast too.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    with _without_autocast(u.device.type):
        x, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        delta = F.softplus(delta)
        state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
        if x.shape[1] == 0:
            y = x * 0  # torch.stack wants at least one token
        elif x.shape[1] <= CHUNK_TOKENS:
            y, _ = _scan_chunk(x, delta, A, B, C, state)
        else:
            chunks = []
            for parts in zip(*(t.split(CHUNK_TOKENS, dim=1) for t in (x, delta, B, C)), strict=True):
                arguments = (parts[0], parts[1], A, parts[2], parts[3], state)
                if torch.is_grad_enabled() and not needs_plain_operators():  # torch.func knows no checkpoints
                    y, state = checkpoint(_scan_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    y, state = _scan_chunk(*arguments)
                chunks.append(y)
            y = torch.cat(chunks, dim=1)
        if D is not None:
            y = y + x * D.to(dtype)
        return y.to(u.dtype)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    known = torch.amp.is_autocast_available(device)  # not on meta, where shapes are worked out and products counted
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def _scan_chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Scan of a few tokens from a given state (b, d, n). Returns y (b, L, d) and the state after the last token."""
    decay = torch.exp(dt.unsqueeze(-1) * A)  # (b, L, d, n)
    drive = (dt * x).unsqueeze(-1) * B.unsqueeze(2)
    outputs = []
    for decay_t, drive_t, C_t in zip(decay.unbind(1), drive.unbind(1), C.unbind(1), strict=True):
        state = torch.addcmul(drive_t, decay_t, state)
        outputs.append((state * C_t.unsqueeze(1)).sum(-1))
    return torch.stack(outputs, dim=1), state
