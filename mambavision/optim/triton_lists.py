"""LAMB, the moving average and the gradient norm on CUDA: each a few launches for a whole list of tensors, no host sync.

Owns the tables by which the kernels (`triton_kernels.py`) find the tensors. A table depends on nothing but the addresses
and sizes in it, so it is kept under them: while the tensors stay where they are, nothing is built or uploaded. Where
gradients come to lie elsewhere in every step (zero_grad(set_to_none=True)), a few KB of addresses are.

All tensors are float32, dense, on one device, and each gradient and moment is laid out as its parameter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambavision.optim import triton_kernels as kernels

BLOCK = 2048  # elements a program; 16 a thread, all loads of which are in flight at once
WARPS = 4
TRUST_WIDTH, TRUST_WARPS = 256, 1  # sums of blocks that a program takes at once; most tensors have fewer
NORM_WIDTH, NORM_WARPS = 4096, 8

# Triton decides at import, by TRITON_INTERPRET, whether kernels are compiled for a GPU or interpreted on any device.
INTERPRETED = not isinstance(kernels.norm_kernel, triton.JITFunction)


@torch.no_grad()
def lamb_triton(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: Tensor,
    divisor: Tensor,
    refused: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`lamb.lamb_multi_tensor` in three passes over memory, one without weight decay; gradients are left as they are."""
    grads = _laid_out_as(params, grads)  # copies among them live until the launches are queued
    table = _table(params, grads, exp_avgs, exp_avg_sqs)
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    shared = (float(eps), float(weight_decay))
    trust = weight_decay != 0
    sums = table.blocks.new_empty((table.count, 2) if trust else 0, dtype=torch.float32)
    with _on(params[0].device):
        kernels.lamb_moments_kernel[(table.count,)](
            table.addresses, table.blocks, step, divisor, refused, sums, float(lr), *logs,
            1.0 - betas[0], 1.0 - betas[1], *shared, TRUST=trust, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        if trust:
            ratios = sums.new_empty(len(params))
            kernels.lamb_trust_kernel[(len(params),)](
                sums, table.first_blocks, ratios, WIDTH=TRUST_WIDTH, num_warps=TRUST_WARPS
            )
            kernels.lamb_apply_kernel[(table.count,)](
                table.addresses, table.blocks, step, refused, ratios, float(lr), *logs, *shared,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    _mark_changed(params)


@torch.no_grad()
def average_triton(averages: list[Tensor], values: list[Tensor], weight: float, refused: Tensor | None) -> None:
    """average += weight * (value - average), unless refused (0-dim float32 on the device) is 1.0."""
    values = _laid_out_as(averages, values)
    table = _table(averages, values)
    if refused is None:
        refused = torch.zeros((), device=averages[0].device)
    with _on(averages[0].device):
        kernels.average_kernel[(table.count,)](
            table.addresses, table.blocks, refused, float(weight), BLOCK=BLOCK, num_warps=WARPS
        )
    _mark_changed(averages)


@torch.no_grad()
def norm_triton(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all elements, 0-dim float32; squares are summed in float32, inf and nan come through."""
    table = _table(tensors)
    sums = table.blocks.new_empty(table.count, dtype=torch.float32)
    norm = sums.new_empty(())
    with _on(norm.device):
        kernels.squares_kernel[(table.count,)](table.addresses, table.blocks, sums, BLOCK=BLOCK, num_warps=WARPS)
        kernels.norm_kernel[(1,)](sums, norm, table.count, WIDTH=NORM_WIDTH, num_warps=NORM_WARPS)
    return norm


class _Table(NamedTuple):
    """What the kernels' head describes, on the device."""

    addresses: Tensor  # (tensors, lists)
    blocks: Tensor  # (blocks, 3)
    first_blocks: Tensor  # (tensors + 1,)
    count: int  # of blocks


def _table(*lists: Sequence[Tensor]) -> _Table:
    device = lists[0][0].device
    addresses = _addresses(device, tuple(t.data_ptr() for parallel in zip(*lists, strict=True) for t in parallel))
    return _Table(addresses, *_blocks(device, tuple(t.numel() for t in lists[0])))


@lru_cache(maxsize=32)
def _addresses(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    return _upload(torch.tensor(addresses, dtype=torch.int64), device)


@lru_cache(maxsize=32)
def _blocks(device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """An empty tensor has a block as well, so that there is always something to launch."""
    numel = torch.tensor(sizes)
    counts = (numel.add(BLOCK - 1) // BLOCK).clamp(min=1)
    first_blocks = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tensor = torch.repeat_interleave(counts)
    begin = (torch.arange(len(tensor)) - first_blocks[tensor]) * BLOCK
    blocks = torch.stack([tensor, begin, (numel[tensor] - begin).clamp(max=BLOCK)], 1)
    return _upload(blocks, device), _upload(first_blocks, device), len(tensor)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device. torch gives pinned memory to somebody else only when the copies from it have run."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _laid_out_as(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The others; those in another memory format (or, as gradients may be, of another dtype) as copies in the tensors'."""
    return [
        other if _is_alike(tensor, other) else torch.empty_like(tensor).copy_(other)
        for tensor, other in zip(tensors, others, strict=True)
    ]


def _is_alike(left: Tensor, right: Tensor) -> bool:
    return (
        left.stride() == right.stride()
        and left.shape == right.shape
        and left.dtype == right.dtype
        and left.device == right.device
    )


def _mark_changed(tensors: list[Tensor]) -> None:
    """As autograd expects of an operation in place."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
