"""Which number format the forward pass computes in. The scan keeps its state in float32 whatever this says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from mambavision.distributed import World, gather_objects

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(precision: str, world: World) -> str:
    """bf16, fp16 or fp32; `auto` takes bf16 only if every rank's hardware computes in it.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if precision == "fp16" and world.device.type == "cpu":
        raise ValueError("trainer.precision=fp16 needs a GPU; type trainer.precision=bf16 or fp32 (or auto) on a CPU")
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
