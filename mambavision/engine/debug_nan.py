"""debug=nan: which module was the first to make a value or a gradient that is not finite. Owns no remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mambavision.engine.guard import TrainingFailed


def name_first_not_finite(model: nn.Module) -> None:
    """debug=nan: the innermost module that makes a value or a gradient that is not finite ends the run with its name.

    A module around others is named only where none of those it called was to blame. Layers with hooks are called one by
    one, where a fused operator would otherwise take their weights; so sums are rounded differently than without.
    Every tensor is looked at on the host, so steps take many times as long.
    """
    # Of the modules that get images, whose gradient nobody asks for; what goes wrong there shows in their parameters'.
    warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed with respect to module")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_forward_hook(_check_forward(name))
        module.register_full_backward_pre_hook(_check_gradient_before(_caller(name, modules), model))
        module.register_full_backward_hook(_check_backward(name))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(_check_parameter_gradient(name))


def _check_forward(name: str) -> Callable:
    def check(module: nn.Module, inputs: tuple, output: Any) -> None:
        # What came in spoiled was spoiled by the code around this module. Around the outermost one is the data.
        if _finite(output) or (name and not _finite(inputs)):
            return
        weights = [n for n, p in module.named_parameters() if not torch.isfinite(p).all()]
        because = f"its {', '.join(weights)} is not finite" if weights else _range_of(inputs)
        raise TrainingFailed(f"debug=nan: {_called(name, module)} gave a value that is not finite; {because}")

    return check


def _check_backward(name: str) -> Callable:
    def check(module: nn.Module, gradients_in: tuple, gradients_out: tuple) -> None:
        if _finite(gradients_out) and not _finite(gradients_in):
            raise TrainingFailed(f"debug=nan: the gradient through {_called(name, module)} is not finite")

    return check


def _check_gradient_before(caller: str | None, model: nn.Module) -> Callable:
    """Of a gradient that reaches a module from its caller's own code; None: from the loss."""

    def check(module: nn.Module, gradients_out: tuple) -> None:
        if _finite(gradients_out):
            return
        if caller is None:
            raise TrainingFailed("debug=nan: the gradient of the loss by the model's output is not finite")
        called = _called(caller, model.get_submodule(caller))
        raise TrainingFailed(f"debug=nan: the gradient through {called} is not finite")

    return check


def _check_parameter_gradient(name: str) -> Callable:
    def check(gradient: Tensor) -> None:
        if not _finite(gradient):
            raise TrainingFailed(f"debug=nan: the gradient of {name} is not finite")

    return check


def _caller(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The module around `name` that calls it: lists of modules are not called."""
    if not name:
        return None
    around = name.rpartition(".")[0]
    return _caller(around, modules) if isinstance(modules[around], nn.ModuleList) else around


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _finite(value: Any) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _range_of(inputs: tuple) -> str:
    return "its input: " + ", ".join(f"{tuple(t.shape)} from {t.min():.3g} to {t.max():.3g}" for t in _tensors(inputs))
