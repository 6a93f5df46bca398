"""The selective scan on the CPU: the compiled kernels of `native/scan.cpp`, and what torch.compile must know of it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mambavision.ops.native_build import load_native
from mambavision.ops.tracing import constant_when_traced

TILE_TOKENS, STATE_PAD, CHANNEL_PAD = 16, 8, 16  # as in native/scan_kernel.h


def scan_cpu(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, delta_bias: Tensor | None = None
) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t . h_t + D u_t;  dt = softplus(delta + delta_bias).

    Mamba (arXiv 2312.00752), algorithm 2, with its simplified (Euler) discretisation of B.

    Args:
        u, delta: (b, L, d), float32 or bfloat16, last dimension contiguous (slices of a projection need no copy).
        A: (d, n).  D, delta_bias: (d,) or None. Taken as float32.
        B, C: (b, L, n), float32 or bfloat16, likewise sliced freely.

    Returns:
        (b, L, d) in u's dtype. The state is float32. Differentiable once; bitwise repeatable at any number of threads.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: the kernels could not be built here, or a gradient of a gradient is asked for.
    """
    _require_native()
    return torch.ops.mambavision.selective_scan(u, delta, A, B, C, D, delta_bias)


@constant_when_traced
def _require_native() -> bool:
    return _operator() is not None


@cache
def _operator() -> torch._ops.OpOverload:
    """Builds, loads and registers the kernels at the first call; raises RuntimeError where that fails."""
    native = load_native()
    if native is None:
        raise RuntimeError(
            "the CPU scan is not built (the warning above says why); install a C++ compiler (apt install g++) "
            "or use scan_backend=reference"
        )
    _register_shapes()
    return native.selective_scan.default


def _register_shapes() -> None:
    @torch.library.register_fake("mambavision::scan_forward")
    def _(u, delta, A, B, C, D, delta_bias, keep_states):
        batch, tokens, channels = u.shape
        kept = (tokens + TILE_TOKENS - 1) // TILE_TOKENS - 1 if keep_states else 0
        states, padded_channels = _round_up(A.shape[1], STATE_PAD), _round_up(channels, CHANNEL_PAD)
        checkpoints = u.new_empty((batch, kept, states, padded_channels), dtype=torch.float32)
        return u.new_empty((batch, tokens, channels)), checkpoints

    @torch.library.register_fake("mambavision::scan_backward")
    def _(dy, u, delta, A, B, C, D, delta_bias, checkpoints):
        parameter = A.new_empty((u.shape[2],), dtype=torch.float32)
        return (
            u.new_empty(u.shape),
            u.new_empty(u.shape),
            A.new_empty(A.shape, dtype=torch.float32),
            B.new_empty(B.shape),
            C.new_empty(C.shape),
            parameter,
            parameter.clone(),
        )


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
