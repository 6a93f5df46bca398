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
from operator import attrgetter
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from mambavision.optim import triton_kernels as kernels

BLOCK = 2048  # elements a program; 16 a thread, all loads of which are in flight at once
WARPS = 4
TRUST_WIDTH, TRUST_WARPS = 1024, 4  # sums that a program takes at once; a tensor of 2 million elements has as many
NORM_WIDTH, NORM_WARPS = 4096, 8  # by one program, so wide

_TABLES = 256  # that are kept; each step walks through those of all parameter groups: 50 for L2 with layer_decay

# Triton decides at import, by TRITON_INTERPRET, whether kernels are compiled for a GPU or interpreted on any device.
INTERPRETED = not isinstance(kernels.norm_kernel, triton.JITFunction)
# Older versions of torch take one tensor at a time, for which MambaVision-T's 219 cost 0.07 ms.
_MARKS_LISTS = "Iterable" in str(increment_version.__annotations__.get("tensor"))


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
    """`lamb.lamb_multi_tensor` in two passes over memory, one without weight decay; gradients are left as they are."""
    grads = _laid_out_as(params, grads)  # copies among them live until the launches are queued
    table = _table(params, grads, exp_avgs, exp_avg_sqs)
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    shared = (float(eps), float(weight_decay))
    trust = weight_decay != 0
    sums = table.blocks.new_empty((table.count, 2), dtype=torch.float32)
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
    if list(map(Tensor.numel, averages)) != list(map(Tensor.numel, values)):
        raise ValueError(
            "an average and its value differ in size; make a new ModelEma after a change of the model's layers"
        )
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


_in_graphs: list[_Table] = []


def _table(*lists: Sequence[Tensor]) -> _Table:
    device = lists[0][0].device
    addresses = _addresses(device, tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists))
    table = _Table(addresses, *_blocks(device, tuple(map(Tensor.numel, lists[0]))))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _in_graphs.append(table)  # replays read it, however many others are made meanwhile
    return table


@lru_cache(maxsize=_TABLES)
def _addresses(device: torch.device, addresses: tuple[tuple[int, ...], ...]) -> Tensor:
    return _upload(torch.tensor(addresses, dtype=torch.int64, device="cpu").t().contiguous(), device)


@lru_cache(maxsize=_TABLES)
def _blocks(device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """An empty tensor has a block as well, so that there is always something to launch."""
    numel = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    counts = (numel.add(BLOCK - 1) // BLOCK).clamp(min=1)
    first_blocks = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tensor = torch.repeat_interleave(counts)
    begin = (torch.arange(len(tensor), device="cpu") - first_blocks[tensor]) * BLOCK
    blocks = torch.stack([tensor, begin, (numel[tensor] - begin).clamp(max=BLOCK)], 1)
    return _upload(blocks, device), _upload(first_blocks, device), len(tensor)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device. torch gives pinned memory to somebody else only when the copies from it have run."""
    if device.type != "cuda":
        return tensor
    if torch.cuda.is_current_stream_capturing():  # a replay would copy from memory that holds something else by then
        raise RuntimeError(
            "a CUDA graph is being captured around tensors that the optimizer has not seen: take a step with the same "
            "gradients before, and clear them by zero_grad(set_to_none=False)"
        )
    return tensor.pin_memory().to(device, non_blocking=True)


def _laid_out_as(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The others, of the same shapes; those in another memory format (or, as gradients may be, dtype) as copies in theirs."""
    if (
        list(map(Tensor.stride, tensors)) == list(map(Tensor.stride, others))
        and set(map(attrgetter("dtype"), others)) == {torch.float32}
        and set(map(Tensor.get_device, others)) == {tensors[0].get_device()}
    ):
        return others
    return [
        other
        if other.stride() == tensor.stride() and other.dtype == tensor.dtype and other.device == tensor.device
        else torch.empty_like(tensor).copy_(other)
        for tensor, other in zip(tensors, others, strict=True)
    ]


def _mark_changed(tensors: list[Tensor]) -> None:
    """As autograd expects of an operation in place."""
    if _MARKS_LISTS:
        increment_version(tensors)
    else:
        for tensor in tensors:
            increment_version(tensor)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
