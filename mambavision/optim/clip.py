"""The global gradient norm and what follows from it: one divisor for the gradients and one verdict on the step.

Nothing here waits for the device. A step whose gradient norm is not finite is refused on the device, by every
optimizer of this package and by the EMA, so the trainer never has to look at the number to stay safe.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mambavision.optim.native import native_kernels, triton_kernels


@torch.no_grad()
def global_grad_norm(params: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients of `params` as a 0-dim tensor on their device; those without one are left out.

    Under DDP the gradients are already averaged, so every rank gets the same value and no collective is needed.
    Raises RuntimeError if no parameter has a gradient.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise RuntimeError("no parameter has a gradient: call loss.backward() before asking for the gradient norm")
    native = native_kernels(grads)
    if native is not None:
        return native.global_norm(grads)
    triton = triton_kernels(grads)
    if triton is not None:
        return triton.norm_triton(grads)
    if any(grad.dtype in (torch.float16, torch.bfloat16) for grad in grads):
        # A norm in their type would overflow or be rounded, and the fused kernels want what follows from it in float32.
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def clear_gradients(params: list[Tensor], *, keep_memory: bool) -> None:
    """keep_memory: zeros, for several backward passes to add to; without it none, and the next one's are taken as they are."""
    if keep_memory:
        torch._foreach_zero_([p.grad for p in params if p.grad is not None])  # Optimizer.zero_grad: a kernel for each
        return
    for p in params:
        p.grad = None


def gradient_divisor(grad_norm: Tensor, *limits: float | None) -> Tensor:
    """What to divide the gradients by so that their global norm stays within every limit (None or 0: no limit).

    Clipping to 5.0 outside the optimizer and to 1.0 inside it is clipping once to the smaller of the two.
    """
    active = [limit for limit in limits if limit]
    if not active:
        return torch.ones_like(grad_norm)
    return (grad_norm / min(active)).clamp(min=1.0)


def is_refused(grad_norm: Tensor) -> Tensor:
    """1.0 where the step must change nothing (the norm is inf or nan), else 0.0; float32, on the norm's device.

    float32 because that is the form in which torch's fused kernels take it (`found_inf`).
    """
    return grad_norm.mul(0).ne_(0).to(torch.float32)  # inf * 0 is nan; torch.isfinite takes four kernels for it
