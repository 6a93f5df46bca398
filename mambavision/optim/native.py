"""When our kernels take over from torch's multi-tensor functions: float32, if they could be built or are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from types import ModuleType

import torch
from torch import Tensor, nn

from mambavision.ops.native_build import load_native

_PLAIN = {Tensor, nn.Parameter}  # not shards of them (FSDP), whose elements are elsewhere


def native_kernels(tensors: Sequence[Tensor]) -> object | None:
    """torch.ops.mambavision if it can work on these tensors (CPU), else None."""
    if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors):
        return load_native()
    return None


def triton_kernels(tensors: Sequence[Tensor]) -> ModuleType | None:
    """`triton_lists` if it can work on these tensors (dense, on one CUDA device), else None."""
    if not tensors[0].is_cuda or not _triton_available():
        return None
    # Attributes by map: for the 219 tensors of MambaVision-T a generator over them would take three times as long.
    if not set(map(type, tensors)) <= _PLAIN or set(map(attrgetter("dtype"), tensors)) != {torch.float32}:
        return None
    if len(set(map(Tensor.get_device, tensors))) > 1 or not all(map(is_dense, tensors)):
        return None
    from mambavision.optim import triton_lists  # imports triton, which nobody without a GPU has to wait for

    return None if triton_lists.INTERPRETED else triton_lists


@cache
def _triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory without gaps, in either of the network's memory formats."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
