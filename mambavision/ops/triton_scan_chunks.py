"""Triton kernels that cut a long sequence of the selective scan into chunks scanned at the same time.

Few windows of many tokens (detection: 12 544) leave most of the chip idle if each is walked in order. The state enters
a chunk linearly, h_end = exp(A sum dt) h_begin + summary, so: one kernel takes every chunk's summary from a zero state,
one combines them chunk after chunk, and the scan's kernels (triton_scan_kernels.py) then run all chunks side by side.
"""

import triton
import triton.language as tl

from mambavision.ops.triton_scan_kernels import (
    LOG2_E,
    advance,
    channels_of_program,
    load_time_channel,
    load_time_state,
    softplus_and_slope,
    take,
)


@triton.jit
def chunk_summary_kernel(
    drive_ptr, delta_ptr, a_ptr, bias_ptr, mix_ptr, chunk_end_ptr, chunk_dt_ptr,
    length, channels, chunk_length,
    stride_drive_row, stride_drive_token, stride_delta_row, stride_delta_token, stride_mix_row, stride_mix_token,
    STATES: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a chunk of a long sequence does to the state that enters it: (row, chunk, channel, state) and sum of dt.

    h_end = exp(A sum dt) h_begin + summary. Forward: drive = u, mix = B. REVERSE, for the adjoint that enters from
    behind: drive = dy, mix = C. Grid: (channel blocks, rows, chunks).
    """
    channel = channels_of_program(GROUPS, WIDTH)
    channel_ok = channel < channels
    state_offset = channel[:, None, :] * STATES + tl.arange(0, STATES)[None, :, None]
    a = tl.load(a_ptr + state_offset, mask=channel_ok[:, None, :], other=0.0) * LOG2_E
    bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)
    row = tl.program_id(1).to(tl.int64)
    first_token = tl.program_id(2) * chunk_length
    end_token = tl.minimum(first_token + chunk_length, length)
    tiles = tl.cdiv(end_token - first_token, TILE)
    h = tl.zeros([GROUPS, STATES, WIDTH], tl.float32)
    dt_sum = tl.zeros([GROUPS, WIDTH], tl.float32)
    for step in range(0, tiles):
        tile = step
        if REVERSE:
            tile = tiles - 1 - step
        token = first_token + tile * TILE + tl.arange(0, TILE)
        mask = (token < end_token)[:, None, None] & channel_ok[None]
        drive = load_time_channel(drive_ptr + row * stride_drive_row, token, stride_drive_token, channel, mask)
        raw = load_time_channel(delta_ptr + row * stride_delta_row, token, stride_delta_token, channel, mask)
        mix = load_time_state(mix_ptr + row * stride_mix_row, token, stride_mix_token, end_token, STATES)
        dt, _ = softplus_and_slope(raw + bias[None])
        dt = tl.where(mask, dt, 0.0)
        dt_sum += tl.sum(dt, 0)
        decay = tl.exp2(dt[:, :, None, :] * a[None])
        if REVERSE:
            pull = drive[:, :, None, :] * mix
            for i in tl.static_range(TILE - 1, -1, -1):
                h = take(decay, i, TILE) * (take(pull, i, TILE) + h)
        else:
            h = advance(h, decay, (dt * drive)[:, :, None, :] * mix, TILE)
    chunk = row * tl.num_programs(2) + tl.program_id(2)
    tl.store(chunk_end_ptr + chunk * channels * STATES + state_offset, h, mask=channel_ok[:, None, :])
    tl.store(chunk_dt_ptr + chunk * channels + channel, dt_sum, mask=channel_ok)


@triton.jit
def chunk_carry_kernel(
    chunk_end_ptr, chunk_dt_ptr, a_ptr, chunk_begin_ptr, chunks, channels,
    STATES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From the chunks' summaries the state that enters each chunk, same shape. Grid: (channel blocks, rows)."""
    channel = channels_of_program(GROUPS, WIDTH)
    channel_ok = channel < channels
    state_offset = channel[:, None, :] * STATES + tl.arange(0, STATES)[None, :, None]
    state_ok = channel_ok[:, None, :]
    a = tl.load(a_ptr + state_offset, mask=state_ok, other=0.0) * LOG2_E
    carry = tl.zeros([GROUPS, STATES, WIDTH], tl.float32)
    for step in range(0, chunks):
        chunk = step
        if REVERSE:
            chunk = chunks - 1 - step
        index = tl.program_id(1).to(tl.int64) * chunks + chunk
        offset = index * channels * STATES + state_offset
        tl.store(chunk_begin_ptr + offset, carry, mask=state_ok)
        summary = tl.load(chunk_end_ptr + offset, mask=state_ok, other=0.0)
        dt_sum = tl.load(chunk_dt_ptr + index * channels + channel, mask=channel_ok, other=0.0)
        carry = tl.exp2(dt_sum[:, None, :] * a) * carry + summary
