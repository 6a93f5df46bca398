#!/usr/bin/env python
"""How long a checkpoint stops the training, against copying the same tensors once; and how long the writing takes.

    python scripts/bench_checkpoint.py --model mambavision_b [--json FILE]

The state is that of a run: model, EMA, LAMB with both moments. "copy" is one pass of Tensor.copy_ over those tensors
into memory that exists already; "blocked" is how long Checkpointer.save keeps the calling thread, the write going on
behind it. "first_blocked_unprepared" is the first save where nobody has allocated and touched the buffers before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mambavision import create_model
from mambavision.config import CheckpointConfig
from mambavision.engine.checkpointer import Checkpointer
from mambavision.optim import Lamb, ModelEma, build_param_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mambavision_b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    state = training_state(args.model, torch.device(args.device))
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        results = measure(state, args.model, args.saves, Path(directory))
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    report = {"machine": {**machine, "threads": torch.get_num_threads()}, "results": results}
    print("\n".join(f"{r['name']:<28} {r['ms']:9.1f} ms   n={r['n']}  spread {r['spread']:.1f} ms" for r in results))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def training_state(name: str, device: torch.device) -> dict[str, Any]:
    model = create_model(name, num_classes=1000).to(device)
    ema = ModelEma(model, 0.9998)
    optimizer = Lamb(build_param_groups(model, 0.05), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    return {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in tensors_of(item)]


def measure(state: dict[str, Any], name: str, saves: int, directory: Path) -> list[dict[str, Any]]:
    tensors = [t.detach() for t in tensors_of(state)]
    targets = [torch.zeros_like(t, device="cpu", pin_memory=t.is_cuda) for t in tensors]
    gibibytes = sum(t.numel() * t.element_size() for t in tensors) / 2**30
    print(f"{name}: {len(tensors)} tensors, {gibibytes:.2f} GiB")
    written: list[float] = []

    def log(event: str, **fields: Any) -> None:
        assert event == "checkpoint", fields
        written.append(fields["seconds"])

    cold = Checkpointer(directory, CheckpointConfig(keep_last=1), log)
    unprepared = [timed(lambda: cold.save(state, step=0, record={}))]
    cold.finish()
    warm = Checkpointer(directory, CheckpointConfig(keep_last=1), log)
    warm.host_copy = cold.host_copy  # prepared by now
    copies, blocked = [], []
    for step in range(1, saves + 1):  # in turn, so that whatever else the machine does meets both
        copies.append(timed(lambda: [target.copy_(t) for target, t in zip(targets, tensors)]))
        blocked.append(timed(lambda step=step: warm.save(state, step=step, record={})))
        warm.finish()
    return [
        row(name, "copy", copies),
        row(name, "blocked", blocked),
        row(name, "first_blocked_unprepared", unprepared),
        row(name, "written", written),
    ]


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row(model: str, name: str, seconds: list[float]) -> dict[str, Any]:
    milliseconds = [1000 * s for s in seconds]
    spread = max(milliseconds) - min(milliseconds)
    return {
        "model": model,
        "name": name,
        "ms": statistics.median(milliseconds),
        "n": len(milliseconds),
        "spread": spread,
    }


if __name__ == "__main__":
    main()
