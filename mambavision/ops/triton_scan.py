"""The selective scan on CUDA through our own Triton kernels: tile sizes, launches, and the custom op with its rules.

The kernels are in triton_scan_kernels.py and, for long sequences, triton_scan_chunks.py; why they are shaped as they
are, with the counts, is in docs/performance.md. Short sequences fill the chip through their number: every (window,
block of channels) is a program of one warp, and where there are more programs than the chip holds at once, one program
takes several windows in turn. Long sequences of few windows are cut into chunks that are scanned at the same time.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mambavision.ops import triton_scan_chunks as chunk_kernels
from mambavision.ops import triton_scan_kernels as kernels

# Tokens loaded together, and tokens between two saved states. 4 and 8 keep the backward at 167 registers without a
# spill, so that 12 warps share a multiprocessor; the saved states take as much memory as u in float32.
TILE = 4
CHECKPOINT_EVERY = 8
MINIMUM_CHUNK_TOKENS = 256
# A multiprocessor issues from 4 schedulers, and holds 12 of our warps at 167 registers a thread.
SCHEDULERS = 4
RESIDENT_PROGRAMS = 12
# Programs take several windows in turn only beyond this many fillings of the chip: a half-empty last one is then cheap.
WAVES = 4
# Triton decides at import, by TRITON_INTERPRET, whether kernels are compiled for a GPU or interpreted on any device.
_INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """How a kernel is laid over (rows, tokens, channels)."""

    groups: int  # channels a thread holds one below the other
    width: int  # channels side by side over the threads of the warp
    channel_blocks: int
    rows_per_program: int
    row_groups: int
    chunk_tokens: int
    chunks: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.channel_blocks, self.row_groups, self.chunks


def scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> Tensor:
    """The scan of `reference.scan_reference`, same shapes, forward and backward in one kernel each.

    u, delta (b, L, d) and B, C (b, L, n) in float32, bfloat16 or float16, each in its own dtype, rows and tokens at
    any stride; n a power of two. The state, the sums and the gradients of A, D and delta_bias are float32. Bitwise
    repeatable on one device. Cannot be differentiated twice.
    """
    if u.device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"the Triton scan runs on CUDA tensors, this one is on {u.device}; use scan_backend=auto "
            "(or TRITON_INTERPRET=1 in the environment, to check the kernels on a CPU)"
        )
    for name, tensor in {"u": u, "delta": delta, "B": B, "C": C}.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"the Triton scan takes float32, bfloat16 and float16, but {name} is {tensor.dtype}; "
                "use scan_backend=reference"
            )
    states = A.shape[1]
    if states & (states - 1) or states > 256:
        raise ValueError(
            f"the Triton scan wants a power of two up to 256 as number of states, got {states}; "
            f"use {1 << (states - 1).bit_length()} or scan_backend=reference"
        )
    if max(t.shape[1] * t.stride(1) for t in (u, delta, B, C)) >= 2**31:
        raise ValueError(
            "a sequence of u, delta, B or C spans 2**31 elements or more, beyond the kernels' offsets; "
            f"u has {u.shape[1]} tokens {u.stride(1)} elements apart: make it contiguous or shorter"
        )
    differentiable = (t for t in (u, delta, A, B, C, D, delta_bias) if t is not None)
    keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    # The parameters go in as float32 whatever autocast says: the casts are differentiable and cost nothing when idle.
    A, D, delta_bias = (t if t is None else t.float() for t in (A, D, delta_bias))
    return torch.ops.mambavision.triton_scan_forward(u, delta, A, B, C, D, delta_bias, keep_states)[0]


def plan_forward(rows: int, tokens: int, channels: int, states: int, multiprocessors: int) -> Plan:
    """Whole channels in a thread (no shuffles) where that gives each scheduler a warp, else fewer states a thread."""
    for states_per_thread in (8, 4, 2):
        width = _floor_to_channels(32 * states_per_thread // states, channels, at_most=32)
        if rows * triton.cdiv(channels, width) >= SCHEDULERS * multiprocessors:
            break
    return _lay_out(rows, tokens, channels, 1, width, multiprocessors)


def plan_backward(rows: int, tokens: int, channels: int, states: int, multiprocessors: int) -> Plan:
    """Two groups of 8 channels: the sums over channels (dB, dC) and over states (du, ddelta) both stay short."""
    width = _floor_to_channels(64 // states, channels, at_most=8)
    groups = 2 if states <= 64 and channels > width else 1
    return _lay_out(rows, tokens, channels, groups, width, multiprocessors)


def _floor_to_channels(width: int, channels: int, *, at_most: int) -> int:
    return max(1, min(width, at_most, triton.next_power_of_2(channels)))


def _lay_out(rows: int, tokens: int, channels: int, groups: int, width: int, multiprocessors: int) -> Plan:
    channel_blocks = triton.cdiv(channels, groups * width)
    programs = rows * channel_blocks
    wanted = 2 * SCHEDULERS * multiprocessors
    chunks = min(wanted // programs, tokens // MINIMUM_CHUNK_TOKENS)
    if chunks < 3:  # chunks do the exponentials twice: two at a time win nothing
        chunks = 1
    chunk_tokens = triton.cdiv(triton.cdiv(tokens, chunks), CHECKPOINT_EVERY) * CHECKPOINT_EVERY
    rows_per_program = max(1, programs // (WAVES * RESIDENT_PROGRAMS * multiprocessors), triton.cdiv(rows, 65535))
    row_groups = triton.cdiv(rows, rows_per_program)
    return Plan(
        groups, width, channel_blocks, rows_per_program, row_groups, chunk_tokens, triton.cdiv(tokens, chunk_tokens)
    )


@torch.library.custom_op("mambavision::triton_scan_forward", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b, L, d), and the states saved for the backward (b, checkpoints, d, n), none without keep_states."""
    u, delta, B, C = (_dense_last(t) for t in (u, delta, B, C))
    A, D, delta_bias = _parameters(A, D, delta_bias)
    (rows, tokens, channels), states = u.shape, A.shape[1]
    y, checkpoints = _forward_fake(u, delta, A, B, C, D, delta_bias, keep_states)
    if y.numel() == 0:
        return y, checkpoints
    plan = plan_forward(rows, tokens, channels, states, _multiprocessors(u.device))
    with _on(u.device):
        chunk_states = _chunk_carry(u, delta, A, B, delta_bias, plan, reverse=False)
        kernels.forward_kernel[plan.grid](
            u, delta, A, B, C, D, delta_bias, y, checkpoints, chunk_states,
            rows, tokens, channels, plan.chunk_tokens, plan.rows_per_program,
            *(t.stride(i) for t in (u, delta, B, C, y) for i in (0, 1)),
            STATES=states, TILE=TILE, GROUPS=plan.groups, WIDTH=plan.width, CHECKPOINT_EVERY=CHECKPOINT_EVERY,
            SAVE=keep_states, CHUNKED=plan.chunks > 1, num_warps=1,
        )  # fmt: skip
    return y, checkpoints


@_forward.register_fake
def _forward_fake(u, delta, A, B, C, D, delta_bias, keep_states):
    rows, tokens, channels = u.shape
    checkpoints = max(tokens - 1, 0) // CHECKPOINT_EVERY if keep_states else 0
    states = torch.empty(rows, checkpoints, channels, A.shape[1], dtype=torch.float32, device=u.device)
    return torch.empty(rows, tokens, channels, dtype=u.dtype, device=u.device), states


@torch.library.custom_op("mambavision::triton_scan_backward", mutates_args=())
def _backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, delta_bias, each in its input's dtype (float32 for an absent D or bias)."""
    dy, u, delta, B, C = (_dense_last(t) for t in (dy, u, delta, B, C))
    A, D, delta_bias = _parameters(A, D, delta_bias)
    (rows, tokens, channels), states = u.shape, A.shape[1]
    du, ddelta, *_ = _backward_fake(dy, u, delta, A, B, C, D, delta_bias, checkpoints)
    if du.numel() == 0:
        return (
            du,
            ddelta,
            *(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (A, B, C, D, delta_bias)),
        )
    plan = plan_backward(rows, tokens, channels, states, _multiprocessors(u.device))
    time_sums = A.new_empty(2, plan.channel_blocks, rows, tokens, states)
    channel_sums = A.new_empty(plan.row_groups * plan.chunks, states + 2, channels)
    with _on(u.device):
        chunk_adjoints = _chunk_carry(dy, delta, A, C, delta_bias, plan, reverse=True)
        kernels.backward_kernel[plan.grid](
            dy, u, delta, A, B, C, D, delta_bias, checkpoints, chunk_adjoints, du, ddelta, time_sums, channel_sums,
            rows, tokens, channels, plan.chunk_tokens, plan.rows_per_program,
            *(t.stride(i) for t in (dy, u, delta, B, C) for i in (0, 1)),
            STATES=states, TILE=TILE, GROUPS=plan.groups, WIDTH=plan.width, CHECKPOINT_EVERY=CHECKPOINT_EVERY,
            CHUNKED=plan.chunks > 1, num_warps=1,
        )  # fmt: skip
    dB, dC = time_sums.sum(1).unbind(0)
    channel_total = channel_sums.sum(0)
    dA = channel_total[:states].t().contiguous()
    return du, ddelta, dA, _own(dB, B.dtype), _own(dC, C.dtype), channel_total[-2].clone(), channel_total[-1].clone()


@_backward.register_fake
def _backward_fake(dy, u, delta, A, B, C, D, delta_bias, checkpoints):
    like = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta, A, B, C)]
    return (*like, A.new_empty(A.shape[0]), A.new_empty(A.shape[0]))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, _keep_states = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy: Tensor, _dstates):
    u, delta, A, B, C, D, delta_bias, checkpoints = ctx.saved_tensors
    *gradients, dD, dbias = torch.ops.mambavision.triton_scan_backward(
        dy, u, delta, A, B, C, D, delta_bias, checkpoints
    )
    return (*gradients, None if D is None else dD, None if delta_bias is None else dbias, None)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "the Triton scan cannot be differentiated twice (create_graph=True went through it); "
        "use scan_backend=reference for second derivatives"
    )


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_refuse_second_derivative)


def _chunk_carry(
    drive: Tensor, delta: Tensor, A: Tensor, mix: Tensor, delta_bias: Tensor, plan: Plan, *, reverse: bool
):
    """The states (in reverse: adjoints) that enter the chunks, (b, chunks, d, n); A itself, unread, for one chunk."""
    if plan.chunks == 1:
        return A
    (rows, tokens, channels), states = delta.shape, A.shape[1]
    chunk_end, chunk_begin = (A.new_empty(rows, plan.chunks, channels, states) for _ in range(2))
    chunk_dt = A.new_empty(rows, plan.chunks, channels)
    shape = dict(STATES=states, GROUPS=plan.groups, WIDTH=plan.width, REVERSE=reverse, num_warps=1)
    chunk_kernels.chunk_summary_kernel[(plan.channel_blocks, rows, plan.chunks)](
        drive, delta, A, delta_bias, mix, chunk_end, chunk_dt, tokens, channels, plan.chunk_tokens,
        *(t.stride(i) for t in (drive, delta, mix) for i in (0, 1)), TILE=TILE, **shape,
    )  # fmt: skip
    chunk_kernels.chunk_carry_kernel[(plan.channel_blocks, rows)](
        chunk_end, chunk_dt, A, chunk_begin, plan.chunks, channels, **shape
    )
    return chunk_begin


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _parameters(A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    zeros = A.new_zeros(A.shape[0]) if D is None or delta_bias is None else None
    return A.contiguous(), *(zeros if t is None else t.contiguous() for t in (D, delta_bias))


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In dtype and not a view: a custom op's outputs may not share memory."""
    return tensor.to(dtype) if tensor.dtype != dtype else tensor.clone()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
