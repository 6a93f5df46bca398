"""How torch.compile is to treat our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_when_traced(function: Function) -> Function:
    """torch.compile calls it while tracing and takes the answer for a constant, instead of looking inside.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo for that, which takes everybody
    longer than torch itself.
    """
    function._dynamo_marked_constant = True
    return function
