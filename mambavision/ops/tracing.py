"""Who traces or transforms us, and how torch.compile is to treat our functions.

torch.compile fuses PyTorch's own operators with their neighbours; other runtimes and torch.func know no others. So there
everything that is cheap in PyTorch's operators is made of them; only the scan keeps its own where it can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def constant_when_traced(function: Function) -> Function:
    """torch.compile calls it while tracing and takes the answer for a constant, instead of looking inside.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo for that, which takes everybody
    longer than torch itself.
    """
    function._dynamo_marked_constant = True
    return function


def wants_plain_operators() -> bool:
    """Whether PyTorch's own operators are the better ones now: as `needs_plain_operators`, or torch.compile is tracing."""
    return torch.compiler.is_compiling() or needs_plain_operators()


def needs_plain_operators() -> bool:
    """Whether ours are not known where the call leads: exported or transformed."""
    return is_exported() or is_transformed()


def is_exported() -> bool:
    """Whether a graph is recorded that may run elsewhere: by torch.export, torch.jit.trace, an ONNX exporter."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) calls, for which our operators have no rules."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@constant_when_traced
def is_exported_to_onnx() -> bool:
    """Whether one of torch.onnx's exporters asks. Does not import torch.onnx, which takes a second."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()
