"""Which CUDA scan is faster here, ours in Triton or mamba_ssm's: measured once per shape, dtype and device.

The answer is kept in this process and in a small JSON file (delete it to measure again), and logged once per shape.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CANDIDATES = ("triton", "mamba_ssm")
# Ours takes slices of a projection without a copy; the other has to win clearly, and chance in the measurement of equal
# kernels must not make ranks differ.
ADVANTAGE_NEEDED = 1.10
REPEATS = 7
BUSY_CYCLES = 20_000_000  # some 10 ms, in which a CPU queues what is to be measured


class Problem(NamedTuple):
    """What decides the speed: u is (rows, tokens, channels) with `states` states a channel."""

    rows: int
    tokens: int
    channels: int
    states: int
    dtype: torch.dtype


def choose_cuda_backend(
    problem: Problem,
    device: torch.device,
    *,
    installed: tuple[str, ...] | None = None,
    measure: Callable[[str, Problem, torch.device], float] | None = None,
    cache_file: Path | None = None,
) -> str:
    """'triton' or 'mamba_ssm', the faster of those installed, for forward and backward together.

    With one installed there is nothing to measure. Rows are rounded up to a power of two first, so that the last batch
    of an evaluation does not start a measurement. Plain arguments, so that torch.compile can evaluate the call while
    tracing. installed, measure (milliseconds of a backend on a problem) and cache_file default to this machine's.

    Raises:
        RuntimeError: neither is installed; the message says what to install.
    """
    installed = installed_backends() if installed is None else installed
    if not installed:
        raise RuntimeError(
            "a selective scan on a CUDA tensor needs Triton (pip install triton; PyTorch's CUDA wheels for Linux bring "
            "it) or mamba_ssm (pip install --no-build-isolation -r requirements-gpu.txt), and neither is installed. "
            "To run the slow plain PyTorch loop all the same, say scan_backend=reference"
        )
    if len(installed) == 1:
        _log_only_one(installed[0])
        return installed[0]
    problem = problem._replace(rows=1 << (problem.rows - 1).bit_length())
    return _faster(problem, device, measure or milliseconds, cache_file or default_cache_file())


@cache
def installed_backends() -> tuple[str, ...]:
    """Those of CANDIDATES whose packages are there. Looks, does not import: mamba_ssm fails to import without a GPU."""
    packages = {"triton": ("triton",), "mamba_ssm": ("mamba_ssm", "selective_scan_cuda")}
    return tuple(name for name in CANDIDATES if all(importlib.util.find_spec(p) for p in packages[name]))


def default_cache_file() -> Path:
    """scan_backend.json in $MAMBAVISION_CACHE, else in $XDG_CACHE_HOME/mambavision, else in ~/.cache/mambavision."""
    if "MAMBAVISION_CACHE" in os.environ:
        return Path(os.environ["MAMBAVISION_CACHE"]) / "scan_backend.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambavision" / "scan_backend.json"


_chosen: dict[tuple[str, Path], str] = {}


def _faster(
    problem: Problem, device: torch.device, measure: Callable[[str, Problem, torch.device], float], cache_file: Path
) -> str:
    key = _key(problem, device)
    if (key, cache_file) in _chosen:
        return _chosen[key, cache_file]
    remembered = _read(cache_file)
    if key in remembered:
        times, source = remembered[key], f"remembered in {cache_file}"
    else:
        times, source = _measure_all(problem, device, measure), "measured now"
        _write(cache_file, key, times)
    name = "triton"
    if times["mamba_ssm"] is not None and times["mamba_ssm"] * ADVANTAGE_NEEDED < times["triton"]:
        name = "mamba_ssm"
    shown = ", ".join(f"{k} {'does not run' if v is None else f'{v:.3f} ms'}" for k, v in times.items())
    log.info("selective scan of %s on CUDA: %s (forward + backward: %s; %s)", tuple(problem), name, shown, source)
    _chosen[key, cache_file] = name
    return name


def _measure_all(
    problem: Problem, device: torch.device, measure: Callable[[str, Problem, torch.device], float]
) -> dict[str, float | None]:
    times: dict[str, float | None] = {"triton": measure("triton", problem, device)}
    try:
        times["mamba_ssm"] = measure("mamba_ssm", problem, device)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, CUDA or card
        warnings.warn(
            f"mamba_ssm is installed but does not run here ({type(error).__name__}: {error}); using the Triton scan. "
            "Reinstall it against this torch: pip install --no-build-isolation --force-reinstall --no-deps mamba-ssm",
            stacklevel=4,
        )
        times["mamba_ssm"] = None
    return times


def milliseconds(name: str, problem: Problem, device: torch.device) -> float:
    """Median time on the device of a forward and backward, out of REPEATS after three to compile and warm up."""
    if name == "triton":
        from mambavision.ops.triton_scan import scan_triton as scan
    else:
        from mambavision.ops.mamba_ssm_scan import scan_mamba_ssm as scan
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = example_inputs(problem, device)
        dy = torch.randn_like(inputs[0])
        times = []
        for repeat in range(REPEATS + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(
                BUSY_CYCLES
            )  # both passes are queued behind it: what is measured is the device, not Python
            begin.record()
            torch.autograd.grad(scan(*inputs), inputs, dy)
            end.record()
            end.synchronize()
            if repeat >= 3:
                times.append(begin.elapsed_time(end))
    return statistics.median(times)


def example_inputs(problem: Problem, device: torch.device) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias of a problem, tokens-major, as the mixer makes them, requiring gradients."""
    rows, tokens, channels, states, dtype = problem
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    inputs = [normal(rows, tokens, channels, dtype=dtype), normal(rows, tokens, channels, dtype=dtype), A]
    inputs += [normal(rows, tokens, states, dtype=dtype) for _ in "BC"]
    inputs += [torch.ones(channels, device=device), normal(channels) - 4.0]
    return [t.requires_grad_() for t in inputs]


def _key(problem: Problem, device: torch.device) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    versions = [f"torch {torch.__version__}"]
    for package in ("triton", "mamba-ssm"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # importable without being installed, e.g. from a source tree
            versions.append(f"{package} unknown")
    return ", ".join([card, *(f"{k}={v}" for k, v in problem._asdict().items()), *versions])


def _read(path: Path) -> dict[str, dict[str, float | None]]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        warnings.warn(f"cannot read {path} ({error}): measuring the scan backends again", stacklevel=5)
        return {}


def _write(path: Path, key: str, times: dict[str, float | None]) -> None:
    """Adds one entry. Ranks may write at once: a lost entry is only measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(_read(path) | {key: times}, indent=1))
        unfinished.replace(path)
    except OSError as error:
        warnings.warn(f"cannot remember the scan backend in {path} ({error}): measured again next time", stacklevel=5)


@cache
def _log_only_one(name: str) -> None:
    log.info("selective scan on CUDA: %s, the only one installed", name)
