"""Triton kernels of the selective scan. Launching, autograd and the choice of tile sizes are in triton_scan.py.

    dt_t = softplus(delta_t + bias)          h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t          y_t = C_t . h_t + D u_t

(Gu and Dao 2023, "Mamba", eq. 2 and 4, with the simplified discretisation of B), the state h in float32.

One program is one warp, and walks over the tokens of a window in order with `GROUPS x WIDTH` channels x STATES states
in registers: windows are short and many, so rows x channels fill the chip, and a parallel scan over time would only do
the multiplications twice. Tokens come in tiles of TILE: the loads of a tile are issued together, the exponentials of a
tile are independent, and only one fused multiply-add a token hangs on the one before.

Shapes inside a program: time x channel values are (TILE, GROUPS, WIDTH), states (GROUPS, STATES, WIDTH), a tile of
states (TILE, GROUPS, STATES, WIDTH). Triton deals the threads of the warp to the last axes first: WIDTH = 32 gives
every thread all states of a channel (the sum over states needs no shuffle), WIDTH = 8 a quarter of the states of GROUPS
channels (few shuffles for the sums over channels that dB and dC need). TILE and GROUPS always lie in registers, which
is what makes `take` and `put` free. Values do not depend on that layout, only speed does.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_and_slope(x):
    """log(1 + exp(x)) and its derivative, to 2e-7 relative for every x: no cancellation for small results.

    log1p(z) / z on [0, 1] is a polynomial of degree 8 (least maximum relative error, 3e-8), because the accurate
    logarithm costs more instructions and the fast one loses the small dt that matter most.
    """
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    p = -0.029504956677556038 + z * 0.005232623778283596
    p = 0.07822549343109131 + z * p
    p = -0.1366320699453354 + z * p
    p = 0.1910598874092102 + z * p
    p = -0.2484297752380371 + z * p
    p = 0.3331908941268921 + z * p
    p = -0.4999949336051941 + z * p
    p = 0.9999999403953552 + z * p
    slope = tl.fdiv(tl.where(x >= 0.0, 1.0, z), 1.0 + z)  # fdiv: not the correctly rounded, four times longer division
    return tl.maximum(x, 0.0) + z * p, slope


@triton.jit
def take(tile, index: tl.constexpr, TILE: tl.constexpr):
    """tile[index] of a tile whose first axis lies in registers. On bits, so that the sum with zeros folds away."""
    is_it = tl.arange(0, TILE)[:, None, None, None] == index
    bits = tl.where(is_it, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def put(tile, index: tl.constexpr, value, TILE: tl.constexpr):
    return tl.where(tl.arange(0, TILE)[:, None, None, None] == index, value[None], tile)


@triton.jit
def channels_of_program(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    first = tl.program_id(0) * (GROUPS * WIDTH)
    return first + tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # (GROUPS, WIDTH)


@triton.jit
def load_time_channel(pointer, token, stride, channel, mask):
    """(TILE, GROUPS, WIDTH) of a (tokens, channels) matrix in float32; 0 where masked."""
    return tl.load(pointer + token[:, None, None] * stride + channel[None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_time_state(pointer, token, stride, length, STATES: tl.constexpr):
    """(TILE, 1, STATES, 1) of a (tokens, states) matrix in float32; 0 past the end."""
    state = tl.arange(0, STATES)
    offset = token[:, None] * stride + state[None, :]
    values = tl.load(pointer + offset, mask=(token < length)[:, None], other=0.0).to(tl.float32)
    return values[:, None, :, None]


@triton.jit
def advance(h, decay, drive, TILE: tl.constexpr):
    """State after the TILE tokens of (TILE, GROUPS, STATES, WIDTH) decays and drives."""
    for i in tl.static_range(TILE):
        h = take(decay, i, TILE) * h + take(drive, i, TILE)
    return h


@triton.jit
def forward_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, y_ptr, checkpoint_ptr, chunk_state_ptr,
    rows, length, channels, chunk_length, rows_per_program,
    stride_u_row, stride_u_token, stride_delta_row, stride_delta_token,
    stride_b_row, stride_b_token, stride_c_row, stride_c_token, stride_y_row, stride_y_token,
    STATES: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr, SAVE: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """y, and with SAVE the state before tokens K, 2 K, ..., K = CHECKPOINT_EVERY, (row, checkpoint, channel, state).

    Grid: (channel blocks, groups of rows_per_program rows, chunks). CHUNKED: the state a chunk starts from is read from
    chunk_state_ptr (row, chunk, channel, state).
    """
    channel = channels_of_program(GROUPS, WIDTH)
    channel_ok = channel < channels
    state_offset = channel[:, None, :] * STATES + tl.arange(0, STATES)[None, :, None]
    state_ok = channel_ok[:, None, :]
    a = tl.load(a_ptr + state_offset, mask=state_ok, other=0.0) * LOG2_E
    bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)
    skip = tl.load(d_ptr + channel, mask=channel_ok, other=0.0)

    checkpoints = (length - 1) // CHECKPOINT_EVERY
    first_token = tl.program_id(2) * chunk_length
    end_token = tl.minimum(first_token + chunk_length, length)
    first_row = tl.program_id(1) * rows_per_program
    for row_index in range(0, tl.minimum(rows_per_program, rows - first_row)):
        row = first_row.to(tl.int64) + row_index
        u_row, delta_row = u_ptr + row * stride_u_row, delta_ptr + row * stride_delta_row
        b_row, c_row = b_ptr + row * stride_b_row, c_ptr + row * stride_c_row
        if CHUNKED:
            chunk = row * tl.num_programs(2) + tl.program_id(2)
            h = tl.load(chunk_state_ptr + chunk * channels * STATES + state_offset, mask=state_ok, other=0.0)
        else:
            h = tl.zeros([GROUPS, STATES, WIDTH], tl.float32)

        # A tile is loaded while the one before is computed on: with a warp or two on each scheduler nothing else would
        # hide the way to memory.
        token = first_token + tl.arange(0, TILE)
        mask = (token < end_token)[:, None, None] & channel_ok[None]
        u = load_time_channel(u_row, token, stride_u_token, channel, mask)
        raw = load_time_channel(delta_row, token, stride_delta_token, channel, mask)
        b = load_time_state(b_row, token, stride_b_token, end_token, STATES)
        c = load_time_state(c_row, token, stride_c_token, end_token, STATES)
        for tile_start in range(first_token, end_token, TILE):
            next_token = tile_start + TILE + tl.arange(0, TILE)
            next_mask = (next_token < end_token)[:, None, None] & channel_ok[None]
            next_u = load_time_channel(u_row, next_token, stride_u_token, channel, next_mask)
            next_raw = load_time_channel(delta_row, next_token, stride_delta_token, channel, next_mask)
            next_b = load_time_state(b_row, next_token, stride_b_token, end_token, STATES)
            next_c = load_time_state(c_row, next_token, stride_c_token, end_token, STATES)

            if SAVE and tile_start % CHECKPOINT_EVERY == 0 and tile_start > 0:
                index = row * checkpoints + tile_start // CHECKPOINT_EVERY - 1
                tl.store(checkpoint_ptr + index * channels * STATES + state_offset, h, mask=state_ok)

            dt, _ = softplus_and_slope(raw + bias[None])
            decay = tl.exp2(dt[:, :, None, :] * a[None])
            drive = (dt * u)[:, :, None, :] * b
            h_tile = drive
            for i in tl.static_range(TILE):
                h = take(decay, i, TILE) * h + take(drive, i, TILE)
                h_tile = put(h_tile, i, h, TILE)
            y = tl.sum(h_tile * c, 2) + u * skip[None]
            y_offset = (tile_start + tl.arange(0, TILE))[:, None, None] * stride_y_token + channel[None]
            tl.store(y_ptr + row * stride_y_row + y_offset, y.to(y_ptr.dtype.element_ty), mask=mask)
            u, raw, b, c, mask = next_u, next_raw, next_b, next_c, next_mask


@triton.jit
def backward_kernel(
    dy_ptr, u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, checkpoint_ptr, chunk_adjoint_ptr,
    du_ptr, ddelta_ptr, db_dc_ptr, channel_sum_ptr,
    rows, length, channels, chunk_length, rows_per_program,
    stride_dy_row, stride_dy_token, stride_u_row, stride_u_token, stride_delta_row, stride_delta_token,
    stride_b_row, stride_b_token, stride_c_row, stride_c_token,
    STATES: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """du, ddelta (contiguous), and partial sums: dB, dC over this program's channels, dA, dD, dbias over its tokens.

    Walks each row backwards from checkpoint to checkpoint: runs the states forward again to the start of every tile
    (in registers), then each tile forward and backward. The partial sums go to buffers of their own per program, which
    the caller adds up: no atomics, so the result does not depend on the order in which programs run.

    Grid as the forward's. db_dc_ptr: (2, channel block, row, token, state). channel_sum_ptr: (row group x chunk,
    STATES + 2, channel): dA, then dD, then dbias. chunk_adjoint_ptr: what comes from the tokens after the chunk.
    """
    TILES: tl.constexpr = CHECKPOINT_EVERY // TILE
    channel = channels_of_program(GROUPS, WIDTH)
    channel_ok = channel < channels
    state = tl.arange(0, STATES)
    state_offset = channel[:, None, :] * STATES + state[None, :, None]
    state_ok = channel_ok[:, None, :]
    a = tl.load(a_ptr + state_offset, mask=state_ok, other=0.0) * LOG2_E
    bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0)
    skip = tl.load(d_ptr + channel, mask=channel_ok, other=0.0)
    da = tl.zeros([GROUPS, STATES, WIDTH], tl.float32)
    dd = tl.zeros([GROUPS, WIDTH], tl.float32)
    dbias = tl.zeros([GROUPS, WIDTH], tl.float32)

    checkpoints = (length - 1) // CHECKPOINT_EVERY
    first_token = tl.program_id(2) * chunk_length
    end_token = tl.minimum(first_token + chunk_length, length)
    segments = tl.cdiv(end_token - first_token, CHECKPOINT_EVERY)
    first_row = tl.program_id(1) * rows_per_program
    for row_index in range(0, tl.minimum(rows_per_program, rows - first_row)):
        row = first_row.to(tl.int64) + row_index
        u_row, delta_row = u_ptr + row * stride_u_row, delta_ptr + row * stride_delta_row
        b_row, c_row = b_ptr + row * stride_b_row, c_ptr + row * stride_c_row
        db_row = db_dc_ptr + (tl.program_id(0).to(tl.int64) * rows + row) * length * STATES
        dc_row = db_row + tl.num_programs(0).to(tl.int64) * rows * length * STATES
        if CHUNKED:
            chunk = row * tl.num_programs(2) + tl.program_id(2)
            g = tl.load(chunk_adjoint_ptr + chunk * channels * STATES + state_offset, mask=state_ok, other=0.0)
        else:
            g = tl.zeros([GROUPS, STATES, WIDTH], tl.float32)

        for segment_back in range(0, segments):
            segment_start = first_token + (segments - 1 - segment_back) * CHECKPOINT_EVERY
            index = row * checkpoints + segment_start // CHECKPOINT_EVERY - 1
            h = tl.load(
                checkpoint_ptr + index * channels * STATES + state_offset,
                mask=state_ok & (segment_start > 0), other=0.0,
            )  # fmt: skip
            starts = tl.zeros([TILES, GROUPS, STATES, WIDTH], tl.float32)
            for i in tl.static_range(TILES):
                starts = put(starts, i, h, TILES)
                if i < TILES - 1:
                    token = segment_start + i * TILE + tl.arange(0, TILE)
                    mask = (token < end_token)[:, None, None] & channel_ok[None]
                    u = load_time_channel(u_row, token, stride_u_token, channel, mask)
                    raw = load_time_channel(delta_row, token, stride_delta_token, channel, mask)
                    b = load_time_state(b_row, token, stride_b_token, end_token, STATES)
                    dt, _ = softplus_and_slope(raw + bias[None])
                    h = advance(h, tl.exp2(dt[:, :, None, :] * a[None]), (dt * u)[:, :, None, :] * b, TILE)

            for tile_back in range(0, TILES):
                tile_index = TILES - 1 - tile_back
                token = segment_start + tile_index * TILE + tl.arange(0, TILE)
                mask = (token < end_token)[:, None, None] & channel_ok[None]
                dy = load_time_channel(dy_ptr + row * stride_dy_row, token, stride_dy_token, channel, mask)
                u = load_time_channel(u_row, token, stride_u_token, channel, mask)
                raw = load_time_channel(delta_row, token, stride_delta_token, channel, mask)
                b = load_time_state(b_row, token, stride_b_token, end_token, STATES)
                c = load_time_state(c_row, token, stride_c_token, end_token, STATES)
                dt, slope = softplus_and_slope(raw + bias[None])
                # Past the end nothing may decay: dt = 0 there lets the adjoint through unchanged.
                dt = tl.where(mask, dt, 0.0)
                x = dt * u
                decay = tl.exp2(dt[:, :, None, :] * a[None])
                drive = x[:, :, None, :] * b
                h = take(starts, 0, TILES)
                for i in tl.static_range(1, TILES):
                    h = tl.where(tile_index == i, take(starts, i, TILES), h)
                kept = drive  # exp(dt A) h_{t-1}
                for i in tl.static_range(TILE):
                    kept_i = take(decay, i, TILE) * h
                    kept = put(kept, i, kept_i, TILE)
                    h = kept_i + take(drive, i, TILE)
                pull = dy[:, :, None, :] * c
                adjoint = pull  # dloss / dh_t
                for i in tl.static_range(TILE - 1, -1, -1):
                    adjoint_i = take(pull, i, TILE) + g
                    adjoint = put(adjoint, i, adjoint_i, TILE)
                    g = take(decay, i, TILE) * adjoint_i

                time_state = token[:, None] * STATES + state[None, :]
                in_time = (token < end_token)[:, None]
                db = tl.sum(tl.sum(adjoint * x[:, :, None, :], 1), 2)
                dc = tl.sum(tl.sum((kept + drive) * dy[:, :, None, :], 1), 2)
                tl.store(db_row + time_state, db, mask=in_time)
                tl.store(dc_row + time_state, dc, mask=in_time)
                through_decay = adjoint * kept
                da += tl.sum(through_decay * dt[:, :, None, :], 0)
                dx = tl.sum(adjoint * b, 2)
                ddelta = (tl.sum(through_decay * a[None], 2) * LN_2 + dx * u) * slope
                ddelta = tl.where(mask, ddelta, 0.0)
                offset = row * length * channels + token[:, None, None] * channels + channel[None]
                tl.store(du_ptr + offset, (dx * dt + dy * skip[None]).to(du_ptr.dtype.element_ty), mask=mask)
                tl.store(ddelta_ptr + offset, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
                dd += tl.sum(dy * u, 0)
                dbias += tl.sum(ddelta, 0)

    program = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    sums = channel_sum_ptr + program.to(tl.int64) * (STATES + 2) * channels
    tl.store(sums + state[None, :, None] * channels + channel[:, None, :], da, mask=state_ok)
    tl.store(sums + STATES * channels + channel, dd, mask=channel_ok)
    tl.store(sums + (STATES + 1) * channels + channel, dbias, mask=channel_ok)
