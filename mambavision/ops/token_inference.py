"""Fused token blocks for inference in bfloat16 on CPUs: how their weights are packed, and whether they can run here.

The operators (`native/token_inference.cpp`) are torch.ops.mambavision.{mlp,attention,mixer}_inference.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.native_build import load_native

LOG2_E = 1.4426950408889634
_LANES = 16  # per-channel tables are padded to the widest vector
_STATE_PAD = 8
PANEL_COLUMNS = 32  # kPanelColumns of the kernels


def token_inference_available() -> bool:
    """Whether the compiled kernels are there and the processor has the matrix units they are for."""
    if not matrix_units_available():
        return False
    _register_shapes()
    return True


def matrix_units_available() -> bool:
    """Whether torch and processor multiply bfloat16 matrices in units of their own (AMX)."""
    return load_native() is not None and torch.ops.mambavision.matrix_units_available()


def pack_weight(weight: Tensor, inner: int | None = None) -> Tensor:
    """A linear layer's weight (columns, inner) as the matrix units read it: (blocks of 32 columns, inner / 2, 64), bfloat16.

    inner: zero-padded up to this, an even number.
    """
    columns, width = weight.shape
    inner = width if inner is None else inner
    padded = F.pad(weight.to(torch.bfloat16), (0, inner - width, 0, -columns % PANEL_COLUMNS))
    return padded.view(-1, PANEL_COLUMNS, inner // 2, 2).transpose(1, 2).flatten(2).contiguous()


def pack_taps(*weights: Tensor) -> Tensor:
    """Depthwise weights (channels, 1, taps) as (branches, taps, padded channels), float32."""
    taps = torch.stack([weight.float().squeeze(1).t() for weight in weights])
    return F.pad(taps, (0, -taps.shape[2] % _LANES)).contiguous()


def scan_table(A: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """The scan's parameters, float32 (padded states + 3, padded channels): A log2(e), its magnitude, D, bias."""
    channels, states = A.shape
    scaled = F.pad((A.float() * LOG2_E).t(), (0, 0, 0, -states % _STATE_PAD))
    table = torch.cat((scaled, scaled.abs().amax(0, keepdim=True), D.float()[None], delta_bias.float()[None]))
    return F.pad(table, (0, -channels % _LANES)).contiguous()


@cache
def _register_shapes() -> None:
    """What torch.compile and torch.export know of the operators without running them."""
    for name in ("mlp", "attention", "mixer"):
        torch.library.register_fake(f"mambavision::{name}_inference", lambda x, *_: torch.empty_like(x))
