"""Triton kernels that walk a list of float32 tensors in one launch: LAMB, moving average, sum of squares.

Owns the arithmetic; `triton_lists.py` makes the tables and launches. A program finds its tensor in two tables:

- blocks_ptr (blocks, 3) int64: index of the tensor, first element, number of elements (BLOCK at most) of each program
- addresses_ptr (tensors, lists) int64: where the tensor's data begin, in each of the parallel lists

Elements are taken in storage order, so that all lists must share one memory layout. Addresses promise nothing beyond the 4
bytes of a float (gradients may be views into DDP's buckets). Every sum is taken in a fixed order: results are bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _elements(blocks_ptr, BLOCK: tl.constexpr):
    """This program's tensor, where in it the block begins, and the elements from there with their mask."""
    block = blocks_ptr + tl.program_id(0) * 3
    element = tl.arange(0, BLOCK)
    return tl.load(block), tl.load(block + 1), element, element < tl.load(block + 2).to(tl.int32)


@triton.jit
def _data(addresses_ptr, position):
    return tl.load(addresses_ptr + position).to(tl.pointer_type(tl.float32))


@triton.jit
def _one_minus_power(step, log_beta):
    """1 - beta^step. At the first step of beta = 0.999 the plain difference would have lost four digits of seven."""
    x = step * log_beta
    series = 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _direction(w, m, v, step_ptr, log_beta1, log_beta2, eps, weight_decay):
    """weight_decay * w + adam: what the trust ratio scales."""
    step = tl.load(step_ptr)
    scale = 1.0 / _one_minus_power(step, log_beta1)
    root_scale = 1.0 / tl.sqrt(_one_minus_power(step, log_beta2))
    return m * scale / (tl.sqrt(v) * root_scale + eps) + weight_decay * w


@triton.jit
def lamb_moments_kernel(
    addresses_ptr, blocks_ptr, step_ptr, divisor_ptr, refused_ptr, sums_ptr, lr, log_beta1, log_beta2,
    one_minus_beta1, one_minus_beta2, eps, weight_decay, TRUST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The moments; with TRUST this block's |w|^2 and |update|^2 (blocks, 2), without it the step itself. Grid: blocks.

    The lists: parameters, gradients, first moments, second moments.
    """
    if tl.load(refused_ptr) == 0.0:
        tensor, begin, element, mask = _elements(blocks_ptr, BLOCK)
        w_ptr = _data(addresses_ptr, tensor * 4) + begin + element
        g_ptr = _data(addresses_ptr, tensor * 4 + 1) + begin + element
        m_ptr = _data(addresses_ptr, tensor * 4 + 2) + begin + element
        v_ptr = _data(addresses_ptr, tensor * 4 + 3) + begin + element
        w = tl.load(w_ptr, mask=mask, other=0.0)
        g = tl.load(g_ptr, mask=mask, other=0.0) * (1.0 / tl.load(divisor_ptr))
        m = tl.load(m_ptr, mask=mask, other=0.0)
        v = tl.load(v_ptr, mask=mask, other=0.0)
        m += one_minus_beta1 * (g - m)
        v += one_minus_beta2 * (g * g - v)
        tl.store(m_ptr, m, mask=mask)
        tl.store(v_ptr, v, mask=mask)
        update = _direction(w, m, v, step_ptr, log_beta1, log_beta2, eps, weight_decay)
        if TRUST:
            update = tl.where(mask, update, 0.0)  # 0 / 0 where eps is 0
            sums = sums_ptr + tl.program_id(0) * 2
            tl.store(sums, tl.sum(w * w, 0))
            tl.store(sums + 1, tl.sum(update * update, 0))
        else:
            tl.store(w_ptr, w - lr * update, mask=mask)


@triton.jit
def lamb_trust_kernel(sums_ptr, first_block_ptr, ratio_ptr, WIDTH: tl.constexpr):
    """|w| / |update| of each tensor, 1 where one of them is 0, from the sums of its blocks. Grid: tensors."""
    first, end = tl.load(first_block_ptr + tl.program_id(0)), tl.load(first_block_ptr + tl.program_id(0) + 1)
    weight_sum = tl.zeros([WIDTH], tl.float32)
    update_sum = tl.zeros([WIDTH], tl.float32)
    for begin in range(first, end, WIDTH):
        block = begin + tl.arange(0, WIDTH)
        weight_sum += tl.load(sums_ptr + block * 2, mask=block < end, other=0.0)
        update_sum += tl.load(sums_ptr + block * 2 + 1, mask=block < end, other=0.0)
    weight_norm, update_norm = tl.sqrt(tl.sum(weight_sum, 0)), tl.sqrt(tl.sum(update_sum, 0))
    defined = (weight_norm > 0.0) & (update_norm > 0.0)
    tl.store(ratio_ptr + tl.program_id(0), tl.where(defined, weight_norm / update_norm, 1.0))


@triton.jit
def lamb_apply_kernel(
    addresses_ptr, blocks_ptr, step_ptr, refused_ptr, ratio_ptr, lr, log_beta1, log_beta2, eps, weight_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """w -= lr * ratio * update; the update computed again, which costs no more memory traffic than to keep it."""
    if tl.load(refused_ptr) == 0.0:
        tensor, begin, element, mask = _elements(blocks_ptr, BLOCK)
        w_ptr = _data(addresses_ptr, tensor * 4) + begin + element
        w = tl.load(w_ptr, mask=mask, other=0.0)
        m = tl.load(_data(addresses_ptr, tensor * 4 + 2) + begin + element, mask=mask, other=0.0)
        v = tl.load(_data(addresses_ptr, tensor * 4 + 3) + begin + element, mask=mask, other=0.0)
        update = _direction(w, m, v, step_ptr, log_beta1, log_beta2, eps, weight_decay)
        tl.store(w_ptr, w - lr * tl.load(ratio_ptr + tensor) * update, mask=mask)


@triton.jit
def average_kernel(addresses_ptr, blocks_ptr, refused_ptr, weight, BLOCK: tl.constexpr):
    """average += weight * (value - average). Grid: blocks. The lists: averages, values."""
    if tl.load(refused_ptr) == 0.0:
        tensor, begin, element, mask = _elements(blocks_ptr, BLOCK)
        average_ptr = _data(addresses_ptr, tensor * 2) + begin + element
        average = tl.load(average_ptr, mask=mask, other=0.0)
        value = tl.load(_data(addresses_ptr, tensor * 2 + 1) + begin + element, mask=mask, other=0.0)
        tl.store(average_ptr, average + weight * (value - average), mask=mask)


@triton.jit
def squares_kernel(addresses_ptr, blocks_ptr, sums_ptr, BLOCK: tl.constexpr):
    """The sum of this block's squares. Grid: blocks. One list."""
    tensor, begin, element, mask = _elements(blocks_ptr, BLOCK)
    value = tl.load(_data(addresses_ptr, tensor) + begin + element, mask=mask, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(value * value, 0))


@triton.jit(do_not_specialize=["count"])
def norm_kernel(sums_ptr, norm_ptr, count, WIDTH: tl.constexpr):
    """The root of the sum of `count` numbers, by one program."""
    total = tl.zeros([WIDTH], tl.float32)
    for begin in range(0, count, WIDTH):
        index = begin + tl.arange(0, WIDTH)
        total += tl.load(sums_ptr + index, mask=index < count, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)))
