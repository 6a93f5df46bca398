"""LAMB (You et al. 2020, arXiv 1904.00962) with the semantics that the recipe's learning rate was tuned for.

These are timm's: bias correction, trust ratio |w|/|update| only for groups with weight decay and not bounded, and
gradients clipped to a global norm of 1.0 inside the step. `torch_optimizer.Lamb` differs in each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from mambavision.optim.clip import global_grad_norm, gradient_divisor, is_refused
from mambavision.optim.native import native_kernels, triton_kernels


def _unwrapped(method: Callable) -> Callable:
    """Without torch's wrapper that hides it from torch.compile and, at its first call, imports torch._dynamo: that takes
    longer than torch itself."""
    return getattr(method, "__wrapped__", method)


class Lamb(Optimizer):
    """State per parameter: exp_avg, exp_avg_sq; per group: step (0-dim float32 on the parameters' device).

    max_grad_norm: the clip inside LAMB on the norm over all groups, None for none.
    skipped_steps: how many steps were refused since construction, 0-dim int64 on the device; not part of the state.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {tuple(betas)} must lie in [0, 1), e.g. (0.9, 0.999)")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm {max_grad_norm} must be positive; None switches the inner clip off")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm,
            },
        )
        first = self.param_groups[0]["params"][0]
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=first.device)

    state_dict = _unwrapped(Optimizer.state_dict)
    zero_grad = _unwrapped(Optimizer.zero_grad)

    def add_param_group(self, param_group: dict) -> None:
        _unwrapped(Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        if len({(p.device, p.dtype) for p in group["params"]}) != 1:
            raise ValueError(
                f"parameter group {group.get('name', len(self.param_groups) - 1)!r} mixes devices or dtypes; "
                "give each its own group"
            )
        if any(hasattr(p, "to_local") for p in group["params"]):
            raise ValueError(
                f"parameter group {group.get('name', len(self.param_groups) - 1)!r} holds shards of tensors (FSDP); LAMB's "
                "trust ratios want whole ones: use DDP, or AdamW"
            )
        group.setdefault("step", torch.zeros((), dtype=torch.float32, device=group["params"][0].device))

    def load_state_dict(self, state_dict: dict) -> None:
        _unwrapped(Optimizer.load_state_dict)(self, state_dict)
        for group in self.param_groups:  # torch moves the state of parameters, not that of groups
            group["step"] = group["step"].to(device=group["params"][0].device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    def step(self, *, grad_norm: Tensor | None = None, clip: float | None = None) -> None:
        """Update every parameter that has a gradient; change nothing if the gradient norm is inf or nan.

        grad_norm: `global_grad_norm` of all parameters if the caller has it already (saves a pass over the gradients).
        clip: a further limit on the global norm, folded with max_grad_norm into one division.
        Gradients are consumed: what .grad holds afterwards is unspecified. No host sync on CUDA.
        """
        if grad_norm is None:
            grad_norm = global_grad_norm(p for group in self.param_groups for p in group["params"])
        divisor = gradient_divisor(grad_norm, clip, self.param_groups[0]["max_grad_norm"])
        refused = is_refused(grad_norm)
        accepted = 1.0 - refused
        for group in self.param_groups:
            group["step"] += accepted
            self._update_group(group, divisor, refused)
        self.skipped_steps += refused.to(torch.int64)

    def _update_group(self, group: dict, divisor: Tensor, refused: Tensor) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            grads = [p.grad for p in params]
            _update_for(params)(
                params,
                grads,
                self._moments("exp_avg", params),
                self._moments("exp_avg_sq", params),
                step=group["step"],
                divisor=divisor,
                refused=refused,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def _moments(self, name: str, params: list[Tensor]) -> list[Tensor]:
        moments = [self.state[p].get(name) for p in params]
        for index, (parameter, moment) in enumerate(zip(params, moments, strict=True)):
            if moment is None:
                moments[index] = self.state[parameter][name] = torch.zeros_like(parameter)
            elif moment.stride() != parameter.stride():  # the model's memory format changed since it was saved
                moments[index] = self.state[parameter][name] = torch.empty_like(parameter).copy_(moment)
        return moments


def _update_for(params: list[Tensor]) -> Callable[..., None]:
    if native_kernels(params) is not None:
        return lamb_native
    triton = triton_kernels(params)
    return lamb_multi_tensor if triton is None else triton.lamb_triton


def lamb_native(
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
    """`lamb_multi_tensor` in one pass over memory (native/optimizer.cpp), float32 on the CPU."""
    if refused:
        return
    steps = int(step)
    torch.ops.mambavision.lamb_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        gradient_scale=1.0 / float(divisor),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        correction1=1.0 - betas[0] ** steps,
        correction2=1.0 - betas[1] ** steps,
    )


def lamb_multi_tensor(
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
    """One LAMB update of one group, in place, with torch's multi-tensor kernels: all that the others do not take.

    The update is weight_decay * w + adam(g) (You et al., algorithm 2, line 9). torch's fused Adam computes exactly that
    if it is handed weight_decay * w as its "parameter" and -1 as its learning rate, in one kernel for all tensors, and
    it leaves the moments alone on the device where `found_inf` says so: nan * 0 would be nan, so no weight could.
    """
    update = torch._foreach_mul(params, weight_decay)
    # The fused kernel walks all lists in storage order and does not notice a gradient in another memory format.
    pairs = zip(grads, update, strict=True)
    grads = [g if g.stride() == u.stride() else torch.empty_like(u).copy_(g) for g, u in pairs]
    grad_scale = divisor
    if params[0].dtype == torch.float64:  # grad_scale is float32 by contract, too coarse here
        grads, grad_scale = torch._foreach_div(grads, divisor), None
    torch._fused_adam_(
        update,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(params),
        lr=-1.0,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=refused,
    )
    accepted = (1.0 - refused).to(params[0].dtype)
    if weight_decay == 0:
        torch._foreach_mul_(update, lr * accepted)
    else:
        weight_norms = torch.stack(torch._foreach_norm(params))
        update_norms = torch.stack(torch._foreach_norm(update))
        defined = (weight_norms > 0) & (update_norms > 0)
        trust_ratios = torch.where(defined, weight_norms / update_norms, 1.0)
        torch._foreach_mul_(update, (trust_ratios * (lr * accepted)).unbind())
    torch._foreach_sub_(params, update)
