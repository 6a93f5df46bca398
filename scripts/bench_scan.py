"""Times every scan backend available here against the plain recurrence and against what the machine allows.

    python scripts/bench_scan.py [--device cpu|cuda] [--dtypes float32,bfloat16] [--rounds 9] [--json FILE]

All backends take turns within a round, so that whatever else the machine does hits them alike; figures are medians over
the rounds, the spread is the interquartile range. A turn begins with a call that is not timed, for every backend and for
the copy: inputs are then where a network would have them, which has just written them. --cold leaves that call out, and
the recurrence's 300 MB of intermediate results lie between a backend and its inputs. The bound is measured in the same
run: the larger of a copy that moves as many bytes, taking its turn too, and of the exponentials over the rate of the
kernel's own exponential (CPU only; on CUDA the bytes alone).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from mambavision.ops.backend_choice import BUSY_CYCLES
from mambavision.ops.native_build import load_native
from mambavision.ops.selective_scan import choose_backend, selective_scan_tokens

STATES = 8
SHAPES = {  # tokens, channels of the scan: half the mixer's width
    "T stage 3": (196, 160),
    "T stage 4": (49, 320),
    "B stage 3": (196, 256),
    "B stage 4": (49, 512),
}
MODES = ("forward", "backward", "forward_backward")
# Keeps freed memory in the process instead of faulting it in again at every call, for all backends alike, as long runs do.
MALLOC_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
TILE_TOKENS = 16
Clock = Callable[[], float]  # seconds


@dataclass
class Row:
    """One line of the table; times in milliseconds."""

    name: str
    mode: str
    dtype: str
    shape: str
    batch: int
    tokens: int
    channels: int
    ms: float
    spread: float
    n: int
    speedup_over_reference: float
    bound_ms: float
    times_bound: float


@dataclass
class Machine:
    device: str
    threads: int
    torch: str
    instruction_set: str
    exponentials_g_per_s: float | None


def main() -> None:
    arguments = parse_arguments()
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:  # the C library reads it at start only
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": MALLOC_TUNABLES})
    if arguments.cpu_time:
        arguments.threads = 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    machine = measure_machine(arguments.device, clock)
    print(json.dumps(asdict(machine)))
    rows: list[Row] = []
    for dtype in arguments.dtypes.split(","):
        for shape, (tokens, channels) in SHAPES.items():
            new = bench_shape(arguments, machine, clock, shape, tokens, channels, getattr(torch, dtype))
            rows += new
            for row in new:
                print(
                    f"{row.shape} {row.tokens}x{row.channels} {row.dtype:9} {row.name:10} {row.mode:17}"
                    f"{row.ms:9.3f} ms +-{row.spread:.3f} (n={row.n})  x{row.speedup_over_reference:.1f} reference  "
                    f"{row.times_bound:.2f} x bound",
                    flush=True,
                )
    if arguments.json:
        report = {"machine": asdict(machine), "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="at least 5")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread instead of wall time: for a busy machine"
    )
    parser.add_argument("--cold", action="store_true", help="turns without an untimed call first")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def bench_shape(
    arguments: argparse.Namespace,
    machine: Machine,
    clock: Clock,
    shape: str,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
) -> list[Row]:
    inputs = scan_inputs(arguments.batch, tokens, channels, dtype, arguments.device)
    dy = torch.randn(arguments.batch, tokens, channels, device=arguments.device).to(dtype)
    names = backends(arguments.device)
    times = {(name, mode): [] for name in names for mode in MODES}
    moved = {mode: bytes_moved(mode, arguments.batch, tokens, channels, dtype) for mode in ("forward", "backward")}
    sources = {mode: torch.ones(count // 8, device=arguments.device) for mode, count in moved.items()}
    destinations = {mode: torch.empty_like(source) for mode, source in sources.items()}
    copies: dict[str, list[float]] = {mode: [] for mode in moved}
    for round_index in range(arguments.rounds + 2):  # the first two warm up
        for name in names:
            if not arguments.cold:
                run_once(name, inputs, dy, clock)
            for mode, milliseconds in run_once(name, inputs, dy, clock).items():
                if round_index >= 2:
                    times[name, mode].append(milliseconds)
            if name == "reference":
                for mode, source in sources.items():
                    copy = partial(destinations[mode].copy_, source)
                    if not arguments.cold:
                        copy()
                    copies[mode].append(milliseconds_of(copy, source.device, clock))
    bounds = {
        mode: max(statistics.median(copies[mode][2:]), exponential_ms(machine, arguments.batch * tokens * channels))
        for mode in moved
    }
    bounds["forward_backward"] = bounds["forward"] + bounds["backward"]
    rows = []
    for (name, mode), samples in times.items():
        median, (low, _, high) = statistics.median(samples), statistics.quantiles(samples, n=4)
        bound = bounds[mode]
        reference = statistics.median(times["reference", mode])
        figures = (median, high - low, len(samples), reference / median, bound, median / bound)
        text = str(dtype).removeprefix("torch.")
        rows.append(Row(name, mode, text, shape, arguments.batch, tokens, channels, *figures))
    return rows


def run_once(backend: str, inputs: list[Tensor], dy: Tensor, clock: Clock) -> dict[str, float]:
    """Milliseconds of inference, of forward + backward through autograd, and of that backward alone."""

    def scan() -> Tensor:
        return selective_scan_tokens(*inputs, backend=backend)

    def forward() -> None:
        with torch.no_grad():
            scan()

    result = {"forward": milliseconds_of(forward, dy.device, clock)}
    for tensor in inputs:
        tensor.grad = None
    outputs: list[Tensor] = []
    training_forward = milliseconds_of(lambda: outputs.append(scan()), dy.device, clock)
    result["backward"] = milliseconds_of(lambda: outputs.pop().backward(dy), dy.device, clock)
    result["forward_backward"] = training_forward + result["backward"]
    return result


@cache
def backends(device: str) -> list[str]:
    """The plain recurrence and every other backend that runs on this device."""
    names = ["reference"]
    for name in ("cpu",) if device == "cpu" else ("triton", "mamba_ssm"):
        try:
            names.append(choose_backend(device, torch.float32, name))
        except RuntimeError as reason:  # not installed: said once, then left out
            print(f"{name} left out: {reason}")
    return names


def bytes_moved(mode: str, batch: int, tokens: int, channels: int, dtype: torch.dtype) -> int:
    """What a scan must at least read and write."""
    elements, states = batch * tokens * channels, batch * tokens * STATES  # of u; of B
    if mode == "forward":  # reads u, delta, B, C; writes y
        return (3 * elements + 2 * states) * dtype.itemsize
    # Reads u, delta, dy, B, C and the states kept; writes du, ddelta, dB, dC.
    return (5 * elements + 4 * states) * dtype.itemsize + elements * STATES * 4 // TILE_TOKENS


def exponential_ms(machine: Machine, elements: int) -> float:
    """Time of the exponentials alone: one for each decay and one for the softplus; 0 where their rate is not known."""
    return elements * (STATES + 1) / machine.exponentials_g_per_s / 1e6 if machine.exponentials_g_per_s else 0.0


def measure_machine(device: str, clock: Clock) -> Machine:
    native = load_native() if device == "cpu" else None
    rate = None
    if native is not None:
        rates = []
        for _ in range(9):
            start = clock()
            rates.append(native.scan_exponentials(20_000_000) / (clock() - start) / 1e9)
        rate = statistics.median(rates)
    return Machine(
        device=processor_name() if device == "cpu" else torch.cuda.get_device_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        instruction_set=native.native_isa() if native else "",
        exponentials_g_per_s=rate,
    )


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def milliseconds_of(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_seconds = clock()
    work()
    return (clock() - start_seconds) * 1e3


def scan_inputs(batch: int, tokens: int, channels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias with the decays of a freshly initialised Mamba: dt from 0.001 to 0.1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.exp(torch.rand(channels, generator=generator) * 4.6 - 6.9)
    activations = [normal(batch, tokens, channels), normal(batch, tokens, channels) * 0.5]
    A = -torch.arange(1.0, STATES + 1).repeat(channels, 1)
    states = [normal(batch, tokens, STATES), normal(batch, tokens, STATES)]
    parameters = [torch.ones(channels), dt + torch.log(-torch.expm1(-dt))]
    tensors = [*(t.to(dtype) for t in activations), A, *(t.to(dtype) for t in states), *parameters]
    return [tensor.to(device).requires_grad_() for tensor in tensors]


if __name__ == "__main__":
    main()
