"""When the optimizer's compiled CPU kernels take over from torch's: float32, on the CPU, if they could be built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambavision.ops.native_build import load_native


def native_kernels(tensors: Sequence[Tensor]) -> object | None:
    """torch.ops.mambavision if it can work on these tensors, else None (torch's multi-tensor functions then do)."""
    if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors):
        return load_native()
    return None
