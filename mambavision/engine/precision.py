"""Which number format the forward pass computes in. The scan keeps its state in float32 whatever this says."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch

from mambavision.distributed import World, gather_objects

NO_BF16 = (
    "precision is bf16, but the {device} here has no bfloat16 instructions: PyTorch emulates them, many times slower "
    "than float32. Type trainer.precision=auto (eval.py: precision=auto), which takes bf16 only where it is fast"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(precision: str, world: World) -> str:
    """bf16, fp16 or fp32; `auto` takes bf16 only if every rank's hardware computes in it.

    Warns on rank 0 where bf16 is asked for and emulated.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if precision == "fp16" and world.device.type == "cpu":
        raise ValueError(
            "precision fp16 needs a GPU; on a CPU type trainer.precision=bf16 (eval.py: precision=bf16), fp32 or auto"
        )
    if precision == "bf16" and world.is_main and not hardware_has_bf16(world.device):
        warnings.warn(NO_BF16.format(device=world.device.type), RuntimeWarning, stacklevel=2)
    if precision != "auto":
        return precision
    return "bf16" if all(gather_objects(hardware_has_bf16(world.device))) else "fp32"


def hardware_has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run on their own instructions, so that they are faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.10
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))


def autocast_context(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=DTYPES[precision])
