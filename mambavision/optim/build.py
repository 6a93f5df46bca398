"""Optimizers by name. All take `step(grad_norm=..., clip=...)` and change nothing where that norm is inf or nan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch_optimizer
from torch import Tensor
from torch.optim import Optimizer

from mambavision.optim.clip import global_grad_norm, gradient_divisor, is_refused
from mambavision.optim.lamb import Lamb

if TYPE_CHECKING:
    from mambavision.config import OptimizerConfig

OPTIMIZERS = ("lamb", "lamb_torch_optimizer", "adamw", "sgd")


def build_optimizer(cfg: OptimizerConfig, param_groups: list[dict]) -> Optimizer:
    """cfg: the config group `optimizer`; param_groups: from `build_param_groups`, which carry the weight decay."""
    betas = tuple(cfg.betas)
    if cfg.name == "lamb":
        return Lamb(param_groups, cfg.lr, betas=betas, eps=cfg.eps, max_grad_norm=cfg.lamb_max_grad_norm)
    if cfg.name == "lamb_torch_optimizer":
        return TorchOptimizerLamb(param_groups, cfg.lr, betas=betas, eps=cfg.eps)
    if cfg.name == "adamw":
        return AdamW(param_groups, cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    if cfg.name == "sgd":
        return SGD(param_groups, cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=True)
    raise ValueError(f"optimizer.name={cfg.name!r} is not known; use one of {', '.join(OPTIMIZERS)}")


def load_optimizer_state(optimizer: Optimizer, state: dict) -> None:
    """What a checkpoint's optimizer has gathered, under the settings and in the memory layout of this start.

    torch takes the settings from the checkpoint as well, and moments as they lie there, which fused kernels would pair with
    the wrong elements of parameters in another memory format.
    Raises ValueError where the groups have other members: torch knows parameters by their place alone.
    """
    ours, theirs = (
        [g.get("param_names") for g in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if ours != theirs:
        raise ValueError(
            "the checkpoint's optimizer has its parameters in other groups, as another optimizer.decay_rule makes them, or "
            "optimizer.layer_decay or model.freeze turned on or off: take the stored value, or start another run from its "
            "weights with model.checkpoint=PATH run_name=NAME"
        )
    progress = ("params", "param_names", "step")  # of a group; everything else in it is a setting
    settings = [{k: v for k, v in group.items() if k not in progress} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, gathered in optimizer.state.items():
        for name, value in gathered.items():
            is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_moment and value.stride() != parameter.stride():
                gathered[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class _ClippedFusedStep:
    """Gives torch's fused optimizers the step of this package: their kernels take the divisor and the verdict."""

    param_groups: list[dict]
    skipped_steps: Tensor = torch.zeros((), dtype=torch.int64)  # on the device from the first step on

    def step(self, *, grad_norm: Tensor | None = None, clip: float | None = None) -> None:
        """See `Lamb.step`."""
        if grad_norm is None:
            grad_norm = global_grad_norm(p for group in self.param_groups for p in group["params"])
        self.grad_scale = gradient_divisor(grad_norm, clip).to(torch.float32)
        self.found_inf = is_refused(grad_norm)
        super().step()
        self.skipped_steps = self.found_inf.to(torch.int64) + self.skipped_steps


class AdamW(_ClippedFusedStep, torch.optim.AdamW):
    """torch.optim.AdamW with `step(grad_norm=..., clip=...)`; no host sync."""


class SGD(_ClippedFusedStep, torch.optim.SGD):
    """torch.optim.SGD with `step(grad_norm=..., clip=...)`; no host sync."""

    def step(self, *, grad_norm: Tensor | None = None, clip: float | None = None) -> None:
        """See `Lamb.step`."""
        for group in self.param_groups:
            for p in group["params"]:
                # torch allocates these without a value and counts on the first step to fill them; it may be refused.
                if group["momentum"] and p.grad is not None and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        super().step(grad_norm=grad_norm, clip=clip)


class TorchOptimizerLamb(torch_optimizer.Lamb):
    """torch_optimizer.Lamb with `step(grad_norm=..., clip=...)`.

    Not the LAMB that the recipe's learning rate belongs to: no bias correction, |w| bounded by 10 in the trust ratio,
    which also applies to biases and norms. It waits for the device twice per parameter, and once more for the verdict.
    """

    skipped_steps: Tensor = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, *, grad_norm: Tensor | None = None, clip: float | None = None) -> None:
        """See `Lamb.step`."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if grad_norm is None:
            grad_norm = global_grad_norm(params)
        if bool(torch.isfinite(grad_norm)):
            torch._foreach_div_([p.grad for p in params], gradient_divisor(grad_norm, clip))
            super().step()
        else:
            self.skipped_steps = self.skipped_steps + 1
