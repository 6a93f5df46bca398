"""Exponential moving average of a model's weights and buffers: the model that is evaluated, and MESA's teacher."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from mambavision.optim.clip import is_refused
from mambavision.optim.native import is_dense, native_kernels, triton_kernels


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
        self.own = _Places(self.module)
        for average in self.own.averaged():  # fused kernels want dense ones, and a copy of a slice is a slice
            average.data = average if is_dense(average) else average.contiguous()
        self.theirs: tuple[weakref.ref, _Places] | None = None  # of the model that was given last

    def __getstate__(self) -> dict:
        """For copies and pickles, which have other models to follow."""
        return self.__dict__ | {"theirs": None}

    def decay_at(self, step: int) -> float:
        """step: optimizer steps done before this one."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, grad_norm: Tensor | None = None) -> None:
        """Move towards `model` (the bare module, not a DDP or compiled wrapper); no host sync.

        Its modules must stay what they are from one update to the next; its tensors need not.
        grad_norm: the one given to `optimizer.step`; where it is inf or nan the step was refused and the average stays.
        """
        theirs = self._places_of(model)
        refused = None if grad_norm is None else is_refused(grad_norm)
        _move(self.own.averaged(), theirs.averaged(), 1.0 - self.decay_at(step), refused)
        _copy(self.own.copied(), theirs.copied(), refused)

    def _places_of(self, model: nn.Module) -> _Places:
        if self.theirs is None or self.theirs[0]() is not model:
            places = _Places(model)
            if places.names != self.own.names:
                raise ValueError(
                    "the EMA holds tensors of other names or shapes than this model; give update() the unwrapped model, and "
                    "make a new ModelEma after a change of its layers (reset_classifier)"
                )
            self.theirs = weakref.ref(model), places
        return self.theirs[1]

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state_dict)


class _Places:
    """Where a module keeps its floating-point tensors, which are averaged, and all others, which are copied.

    Found once: to walk through all modules of MambaVision-T in each update would take a CPU a millisecond.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: tuple[list[str], list[str]] = [], []
        self.places: tuple[list[tuple[dict, str]], list[tuple[dict, str]]] = [], []
        found = set()
        for prefix, part in module.named_modules():
            for holder in (part._parameters, part._buffers):
                for key, tensor in holder.items():
                    if tensor is None or id(tensor) in found:  # one that several modules share
                        continue
                    found.add(id(tensor))
                    kind = 0 if tensor.is_floating_point() else 1
                    self.names[kind].append(f"{prefix}.{key} {tuple(tensor.shape)}")
                    self.places[kind].append((holder, key))

    def averaged(self) -> list[Tensor]:
        return [holder[key] for holder, key in self.places[0]]

    def copied(self) -> list[Tensor]:
        return [holder[key] for holder, key in self.places[1]]


def _move(averages: list[Tensor], values: list[Tensor], weight: float, refused: Tensor | None) -> None:
    """average -= weight * (average - value), also refused when values hold nan (buffers of a diverged forward pass).

    What our kernels do not take is a plain SGD step, which torch has as one multi-tensor kernel that the device can refuse.
    """
    dtypes = {t.dtype for t in averages}
    for dtype in dtypes:
        mine, theirs = averages, values
        if len(dtypes) > 1:
            mine = [t for t in averages if t.dtype == dtype]
            theirs = [v for t, v in zip(averages, values, strict=True) if t.dtype == dtype]
        native = native_kernels(mine + theirs)
        if native is not None:
            if refused is None or not refused:
                native.ema_update(mine, theirs, weight)
            continue
        triton = triton_kernels(mine)
        if triton is not None:
            triton.average_triton(mine, theirs, weight, refused)
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
