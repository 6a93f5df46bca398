"""Exponential moving average of a model's weights and buffers: the model that is evaluated, and MESA's teacher."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mambavision.optim.clip import is_refused
from mambavision.optim.native import native_kernels


class ModelEma:
    """`module` is a copy of `model`, in eval mode, without gradients; a step adds (1-decay) * (model-module).

    decay: share of the average that is kept per step. warmup: start with min(decay, (1+step)/(10+step)), so that short
    runs do not drag their random initial weights along. Integer and boolean buffers are copied.
    The decay is a function of the step, so the module's tensors are all the state there is.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} must lie in [0, 1), e.g. 0.9998")
        self.decay = decay
        self.warmup = warmup
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """step: optimizer steps done before this one."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, grad_norm: Tensor | None = None) -> None:
        """Move towards `model` (the bare module, not a DDP or compiled wrapper); no host sync.

        grad_norm: the one given to `optimizer.step`; where it is inf or nan the step was refused and the average stays.
        """
        averages, counters = _split(self.module)
        values, model_counters = _split(model)
        if averages.keys() != values.keys() or counters.keys() != model_counters.keys():
            raise ValueError("the EMA holds other tensor names than this model; give update() the unwrapped model")
        refused = None if grad_norm is None else is_refused(grad_norm)
        _move(list(averages.values()), list(values.values()), 1.0 - self.decay_at(step), refused)
        _copy(list(counters.values()), list(model_counters.values()), refused)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state_dict)


def _split(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Floating-point tensors, which are averaged, and all others, which are copied; by name."""
    tensors = dict(module.named_parameters())
    tensors.update(module.named_buffers())
    averaged = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
    copied = {name: t.detach() for name, t in tensors.items() if not t.is_floating_point()}
    return averaged, copied


def _move(averages: list[Tensor], values: list[Tensor], weight: float, refused: Tensor | None) -> None:
    """average -= weight * (average - value), which is a plain SGD step: torch has that as one multi-tensor kernel that
    can be refused on the device, also when values hold nan (buffers of a diverged forward pass)."""
    for dtype in {t.dtype for t in averages}:
        mine = [t for t in averages if t.dtype == dtype]
        theirs = [v for t, v in zip(averages, values, strict=True) if t.dtype == dtype]
        native = native_kernels(mine + theirs)
        if native is not None:
            if refused is None or not refused:
                native.ema_update(mine, theirs, weight)
            continue
        torch._fused_sgd_(
            mine,
            torch._foreach_sub(mine, theirs),
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=weight,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # there is no momentum to begin with, and CUDA would warn of that
            grad_scale=None,
            found_inf=refused,
        )


def _copy(counters: list[Tensor], values: list[Tensor], refused: Tensor | None) -> None:
    """counter += accepted * (value - counter): a copy that the device can refuse, exact in integer arithmetic."""
    if not counters:
        return
    counters = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in counters]
    values = [t.view(torch.uint8) if t.dtype == torch.bool else t for t in values]
    if refused is None:
        torch._foreach_copy_(counters, values)
        return
    change = torch._foreach_sub(values, counters)
    torch._foreach_mul_(change, (1.0 - refused).to(counters[0].dtype))
    torch._foreach_add_(counters, change)
