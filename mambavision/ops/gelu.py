"""GELU: a native kernel on the CPU, PyTorch's elsewhere and wherever a graph is traced.

PyTorch's CPU kernels evaluate erf and exp apart, in bfloat16 at 7 ns an element in the backward: with the MLP's hidden layer
that was a fifth of a token block's training step.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.native_build import load_native
from mambavision.ops.tracing import wants_plain_operators


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x), or its tanh form. approximate: "none" | "tanh", as torch.nn.functional.gelu. Any shape and layout."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not wants_plain_operators():
        native = _native()
        if native is not None:
            return native.gelu(x, approximate == "tanh")
    return F.gelu(x, approximate=approximate)


@cache
def _native() -> object | None:
    native = load_native()
    if native is not None:
        torch.library.register_fake("mambavision::gelu_forward", lambda x, tanh_form: torch.empty_like(x))
        torch.library.register_fake("mambavision::gelu_backward", lambda dy, x, tanh_form: torch.empty_like(x))
    return native
