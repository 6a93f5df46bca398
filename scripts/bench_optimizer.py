#!/usr/bin/env python
"""Times one optimizer step and one EMA update: ours, timm's, torch_optimizer's and torch's fused AdamW.

    python scripts/bench_optimizer.py --models mambavision_t,mambavision_b --json optimizer.json

The arms take turns within every round, so that whatever else the machine does hits all alike; ratios are taken within
rounds. All work on the same weights, gradients and moments (so B fits beside the rest), on the parameter list and decay
groups of the real model. A step is what training needs of it: with the clip of the global gradient norm where the
optimizer has one (ours and timm's; torch_optimizer's Lamb and AdamW are timed without, in their favour).

On CUDA `ms` lasts until the device is done, `host_ms` until the call returns, and `device_ms` is what the device needs of
it when all is queued before it begins (not for those that wait for it). `*_torch_kernels` are ours without Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm.optim
import timm.utils
import torch
import torch_optimizer
from torch import nn

from mambavision import create_model
from mambavision.optim import Lamb, ModelEma, build_param_groups, global_grad_norm, native

OURS = {"step": "lamb_ours", "update": "ema_ours"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="mambavision_t,mambavision_b", help="whose parameter lists, comma separated"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; one more goes before them untimed")
    parser.add_argument("--json", type=Path, help="write machine, results and ratios here")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error(f"--rounds {args.rounds} is too few for a median; use at least 5")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    results, ratios = [], []
    for name in args.models.split(","):
        model = create_model(name).to(device)
        times = interleave(arms_of(model), args.rounds, device)
        results += [row(name, arm, values) for arm, values in times.items()]
        total = {arm: [each["ms"] for each in values] for arm, values in times.items()}
        ratios += [ratio_to_ours(name, arm, values, total) for arm, values in total.items() if arm not in OURS.values()]
        report(name, model, results, ratios)
    if args.json:
        content = {"machine": machine(device, args.threads), "results": results, "ratios": ratios}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def arms_of(model: nn.Module) -> dict[str, Callable[[], None]]:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}

    def sharing(optimizer: torch.optim.Optimizer, step: object = None) -> torch.optim.Optimizer:
        for parameter, (exp_avg, exp_avg_sq) in moments.items():
            optimizer.state[parameter].update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
            if step is not None:
                optimizer.state[parameter]["step"] = step.clone() if isinstance(step, torch.Tensor) else step
        return optimizer

    def groups() -> list[dict]:
        return build_param_groups(model, 0.05)

    ours = sharing(Lamb(groups(), lr=1e-4))
    timms = sharing(timm.optim.Lamb(groups(), lr=1e-4))
    torch_optimizers = sharing(torch_optimizer.Lamb(groups(), lr=1e-4), 0)
    adamw = sharing(torch.optim.AdamW(groups(), lr=1e-4, fused=True), torch.zeros((), device=parameters[0].device))
    ema, timms_ema = ModelEma(model, 0.9998), timm.utils.ModelEmaV3(model, decay=0.9998)
    norm = global_grad_norm(parameters)
    arms = {
        "lamb_ours": lambda: ours.step(grad_norm=global_grad_norm(parameters), clip=5.0),
        "lamb_timm": timms.step,
        "lamb_torch_optimizer": torch_optimizers.step,
        "adamw_fused": adamw.step,
        "ema_ours": lambda: ema.update(model, 0, grad_norm=norm),
        "ema_timm": lambda: timms_ema.update(model, 0),
    }
    if norm.is_cuda:
        arms |= {f"{name}_torch_kernels": without_triton(arms[f"{name}_ours"]) for name in ("lamb", "ema")}
    return arms


def without_triton(call: Callable[[], None]) -> Callable[[], None]:
    def with_torchs_kernels() -> None:
        installed, native._triton_available = native._triton_available, lambda: False
        try:
            call()
        finally:
            native._triton_available = installed

    return with_torchs_kernels


def interleave(
    arms: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds per call, one record per round, after a round that warms up."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, call in arms.items():
            times[name].append(time_once(call, device))
    return {name: values[1:] for name, values in times.items()}


def time_once(call: Callable[[], None], device: torch.device) -> dict[str, float]:
    wait_for(device)
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    wait_for(device)
    times = {"ms": (time.perf_counter() - start) * 1e3}
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(
            int(2e9 * (2 * host + 1e-3))
        )  # cycles of at most 2 GHz: everything is queued behind it by then
        begin.record()
        call()
        end.record()
        wait_for(device)
        times |= {"host_ms": host * 1e3, "device_ms": begin.elapsed_time(end)}
    return times


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mode_of(arm: str) -> str:
    return "update" if arm.startswith("ema") else "step"


def row(model: str, arm: str, values: list[dict[str, float]]) -> dict:
    """Medians; spread: half the interquartile range of `ms` over its median."""
    low, median, high = statistics.quantiles((each["ms"] for each in values), n=4)
    medians = {key: round(statistics.median(each[key] for each in values), 3) for key in values[0]}
    return {
        "model": model,
        "name": arm,
        "mode": mode_of(arm),
        "dtype": "float32",
        **medians,
        "n": len(values),
        "spread": round((high - low) / 2 / median, 4),
    }


def ratio_to_ours(model: str, arm: str, values: list[float], times: dict[str, list[float]]) -> dict:
    """How many times longer this arm took than ours, round by round."""
    base = OURS[mode_of(arm)]
    ratios = [theirs / ours for theirs, ours in zip(values, times[base], strict=True)]
    return {
        "model": model,
        "name": f"{arm} / {base}",
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "n": len(ratios),
    }


def report(name: str, model: nn.Module, results: list[dict], ratios: list[dict]) -> None:
    sizes = [p.numel() for p in model.parameters()]
    print(f"{name}: {len(sizes)} tensors, {sum(sizes) / 1e6:.1f}M parameters")
    for result in (r for r in results if r["model"] == name):
        parts = "  host {host_ms:.2f}  device {device_ms:.2f}".format(**result) if "host_ms" in result else ""
        print(f"  {result['name']:22} {result['ms']:9.2f} ms  +-{result['spread']:.1%}  n={result['n']}{parts}")
    for ratio in (r for r in ratios if r["model"] == name):
        print(f"  {ratio['name']:34} {ratio['ratio']:6.2f}x  [{ratio['lowest']:.2f}-{ratio['highest']:.2f}]")


def machine(device: torch.device, threads: int) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


if __name__ == "__main__":
    main()
