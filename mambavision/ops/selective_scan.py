"""The selective scan: one function, several backends, chosen by device, dtype and what is installed.

This module decides; the arithmetic is in `reference.py`, `cpu_scan.py`, `triton_scan.py` and `mamba_ssm_scan.py`,
which are imported when first needed. No backend is ever replaced by a slow one in silence.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mambavision.ops.reference import scan_reference
from mambavision.ops.tracing import constant_when_traced, is_exported_to_onnx, is_transformed

BACKENDS = ("auto", "cpu", "triton", "mamba_ssm", "reference")
ENVIRONMENT_OVERRIDE = "MAMBAVISION_SCAN_BACKEND"
_ALIASES = {"cuda": "mamba_ssm"}
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Selective scan, channels first, with the softplus of delta inside.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t . h_t + D u_t;  dt = softplus(delta + delta_bias).

    Args:
        u, delta: (b, d, L).
        A: (d, n), negative.  D, delta_bias: (d,) or None.
        B, C: (b, n, L).
        backend: one of BACKENDS; the environment variable MAMBAVISION_SCAN_BACKEND overrides `auto`.

    Returns:
        (b, d, L) in u's dtype; the state is kept in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, or a backend that does not exist or not for this device.
        RuntimeError: a CUDA tensor and no CUDA backend installed.
    """
    if u.dim() != 3 or delta.shape != u.shape:
        raise ValueError(
            f"selective_scan wants u and delta of one shape (b, d, L), got {tuple(u.shape)} and {tuple(delta.shape)}"
        )
    y = selective_scan_tokens(
        u.transpose(1, 2).contiguous(),
        delta.transpose(1, 2).contiguous(),
        A,
        B.transpose(1, 2).contiguous(),
        C.transpose(1, 2).contiguous(),
        D,
        delta_bias,
        backend=backend,
    )
    return y.transpose(1, 2)


def selective_scan_tokens(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The same scan, tokens-major, as the model calls it: u, delta (b, L, d); B, C (b, L, n); returns (b, L, d).

    The last dimension of u, delta, B and C must be contiguous; the others may have any stride, so that slices of a
    projection need no copy.
    """
    _check_shapes(u, delta, A, B, C, D, delta_bias)
    shape = None
    if u.device.type == "cuda" and _must_measure() and not is_exported_to_onnx():
        # int() gives up dynamic shapes under torch.compile, which is why it happens only where the choice needs them.
        shape = (int(u.shape[0]), int(u.shape[1]), int(u.shape[2]), int(A.shape[1]))
    scan = _load(choose_backend(u.device.type, u.dtype, backend, shape))
    return scan(u, delta, A, B, C, D, delta_bias)


@constant_when_traced
def choose_backend(
    device: str, dtype: torch.dtype, backend: str = "auto", shape: tuple[int, int, int, int] | None = None
) -> str:
    """The backend that a tensor of this device and dtype will take: cpu, triton, mamba_ssm or reference.

    shape (b, L, d, n) matters where two CUDA backends are installed: the faster of them at that shape is measured once.
    Plain arguments and a plain answer, so that torch.compile evaluates it once while tracing.
    """
    asked = _ALIASES.get(backend, backend)
    if asked == "auto":
        override = os.environ.get(ENVIRONMENT_OVERRIDE, "auto")
        asked = _ALIASES.get(override, override)
    if asked not in BACKENDS:
        raise ValueError(
            f"scan backend {asked!r} does not exist; choose one of {', '.join(BACKENDS)} "
            f"(scan_backend=..., or the environment variable {ENVIRONMENT_OVERRIDE})"
        )
    if asked == "reference" or dtype == torch.float64 or device == "meta":  # there only shapes are worked out
        return "reference"
    if is_exported_to_onnx():
        if asked != "auto":
            raise ValueError(
                f"scan backend {asked!r} is an operator that ONNX does not know; export a model with scan_backend=auto or "
                "reference, which are unrolled there"
            )
        return "reference"
    if asked == "auto" and is_transformed():
        _warn_slow("torch.func (vmap, grad, jvp, ...) has no rule for the native one")
        return "reference"
    if asked == "auto":
        return _automatic(device, dtype, shape)
    if _DEVICE_OF[asked] != device:
        fitting = [name for name in BACKENDS if _DEVICE_OF.get(name, device) == device]
        raise ValueError(
            f"scan backend {asked!r} runs on {_DEVICE_OF[asked]} tensors, this one is on {device}; "
            f"choose one of {', '.join(fitting)}"
        )
    if asked == "cpu" and dtype not in _CPU_DTYPES:
        raise ValueError(f"scan backend 'cpu' takes float32 and bfloat16, not {dtype}; use precision bf16 or fp32")
    if asked == "cpu" and not _cpu_available():
        raise RuntimeError(
            "scan backend 'cpu' was asked for by name but its native code could not be built (the warning above says "
            "why); install a C++ compiler (apt install g++) or use scan_backend=auto, which then falls back"
        )
    if asked == "mamba_ssm" and "mamba_ssm" not in _installed():
        raise RuntimeError(
            "scan backend 'mamba_ssm' needs the package: pip install --no-build-isolation -r requirements-gpu.txt; "
            "or use scan_backend=triton"
        )
    if asked == "triton" and "triton" not in _installed():
        raise RuntimeError("scan backend 'triton' needs the package: pip install triton; or use scan_backend=mamba_ssm")
    return asked


@constant_when_traced
def _must_measure() -> bool:
    return len(_installed()) > 1


def _automatic(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int] | None) -> str:
    if device == "cuda":
        from mambavision.ops.backend_choice import Problem, choose_cuda_backend

        problem = Problem(*(shape or (32, 196, 160, 8)), dtype)
        return choose_cuda_backend(problem, torch.device("cuda"))
    if device == "cpu" and dtype in _CPU_DTYPES:
        return "cpu" if _cpu_available() else "reference"
    _warn_slow(f"there is no fast scan for {dtype} tensors on {device}")
    return "reference"


@cache
def _cpu_available() -> bool:
    """Builds, loads and registers the native CPU scan; where that fails the build warns with its reason."""
    from mambavision.ops import cpu_scan, native_build

    return native_build.load_native() is not None and cpu_scan._operator() is not None


def _installed() -> tuple[str, ...]:
    from mambavision.ops.backend_choice import installed_backends

    return installed_backends()


@cache
def _warn_slow(reason: str) -> None:
    warnings.warn(
        f"selective scan: {reason}; using the plain PyTorch loop, which is about 20 times slower than the native one "
        "(half the speed of a whole training step)",
        stacklevel=3,
    )


def _load(name: str) -> Callable[..., Tensor]:
    if name == "cpu":
        return torch.ops.mambavision.selective_scan  # registered by _cpu_available; torch.compile can trace the call
    if name == "triton":
        from mambavision.ops.triton_scan import scan_triton

        return scan_triton
    if name == "mamba_ssm":
        from mambavision.ops.mamba_ssm_scan import scan_mamba_ssm

        return scan_mamba_ssm
    return scan_reference


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    """Refuse what would otherwise broadcast into a wrong answer or read out of bounds."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"the scan wants u (b, L, d) and A (d, n), got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, tokens, channels = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (batch, tokens, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, tokens, states)),
        "C": (C, (batch, tokens, states)),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"the scan of u {tuple(u.shape)} (batch, tokens, channels) with {states} states wants {name} of shape "
                f"{tuple(shape)}, got {tuple(tensor.shape)}"
            )
        if tensor is not None and tensor.device != u.device:
            raise ValueError(f"the scan wants all tensors on {u.device}, but {name} is on {tensor.device}")
