"""The selective scan through mamba_ssm's CUDA kernels, as a custom op of our own.

mamba_ssm's function is a plain autograd.Function around a pybind module, on which torch.compile breaks the graph;
wrapped with a fake and an autograd rule it is one opaque node. The package is imported at the first CUDA call.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> Tensor:
    """The scan of `reference.scan_reference` on CUDA, same shapes. float32, bfloat16 or float16 in, float32 state.

    Tokens-major; the kernels want channels first, so the inputs are transposed here.
    """
    # The kernels ask for one dtype of u, delta, B, C, a channel-first layout with contiguous tokens, and B, C with a
    # group dimension of one.
    u_cf, delta_cf = (t.transpose(1, 2).contiguous() for t in (u, delta.to(u.dtype)))
    B_cf, C_cf = (t.to(u.dtype).transpose(1, 2).unsqueeze(1).contiguous() for t in (B, C))
    y, _ = torch.ops.mambavision.mamba_ssm_forward(
        u_cf, delta_cf, A.float(), B_cf, C_cf, None if D is None else D.float(),
        None if delta_bias is None else delta_bias.float(),
    )  # fmt: skip
    return y.transpose(1, 2)


@torch.library.custom_op("mambavision::mamba_ssm_forward", mutates_args=(), device_types="cuda")
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    import selective_scan_cuda

    out, states, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, True)
    return out, states


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias):
    chunks = (u.shape[-1] + 2047) // 2048  # the kernels keep one running product and state every 2048 tokens
    return torch.empty_like(delta), A.new_empty(u.shape[0], u.shape[1], chunks, A.shape[1] * 2)


@torch.library.custom_op("mambavision::mamba_ssm_backward", mutates_args=(), device_types="cuda")
def _backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    states: Tensor,
) -> list[Tensor]:  # fmt: skip
    import selective_scan_cuda

    du, ddelta, dA, dB, dC, dD, dbias, *_ = selective_scan_cuda.bwd(
        u, delta, A, B, C, D, None, delta_bias, dy, states, None, None, True, False
    )
    return [du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), *(g for g in (dD, dbias) if g is not None)]


@_backward.register_fake
def _(dy, u, delta, A, B, C, D, delta_bias, states):
    return [torch.empty_like(t) for t in (u, delta, A, B, C, D, delta_bias) if t is not None]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, dy: Tensor, _dstates):
    u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
    gradients = torch.ops.mambavision.mamba_ssm_backward(dy.contiguous(), u, delta, A, B, C, D, delta_bias, states)
    optional = iter(gradients[5:])
    dD = None if D is None else next(optional)
    dbias = None if delta_bias is None else next(optional)
    return (*gradients[:5], dD, dbias)


_forward.register_autograd(_differentiate, setup_context=_keep)
