#!/usr/bin/env python
"""Seconds from the command to its answer: a misspelt setting, a first prediction, a first training step, and timm beside them.

    python scripts/bench_start.py --json start.json
    python scripts/bench_start.py --beside ../other-checkout     # the same commands there, in turns with these

Each arm is a process of its own and the arms take turns, after a round that fills the caches and builds the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREDICTION = "import torch, {package}; {package}.create_model('{model}').eval()(torch.zeros(1, 3, 224, 224))"
TRAINING = "train.py experiment=tiny logger=jsonl trainer.max_steps=1 data.synthetic_eval_samples=8 run_name={name}"
OURS = {
    "misspelt setting": ["train.py", "optimizer.lrr=1"],
    "first prediction": ["-c", PREDICTION.format(package="mambavision", model="mambavision_t")],
    "one training step": [*TRAINING.split(), "output_dir={directory}"],
}
THEIRS = {
    "import torch": ["-c", "import torch"],
    "timm: first prediction": ["-c", PREDICTION.format(package="timm", model="convnext_tiny")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; one more goes before them untimed")
    parser.add_argument("--beside", type=Path, help="another checkout of this project")
    parser.add_argument("--json", type=Path, help="write machine and results here")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error(f"--rounds {args.rounds} is too few for a median; use at least 5")
    if args.beside and not (args.beside / "train.py").exists():
        parser.error(f"--beside {args.beside} has no train.py; give the directory of another checkout")
    arms = [(name, ROOT, words) for name, words in (OURS | THEIRS).items()]
    if args.beside:
        arms += [(f"{name}, {args.beside.name}", args.beside.resolve(), words) for name, words in OURS.items()]
    results = []
    for name, values in measure(arms, args.rounds).items():
        low, median, high = statistics.quantiles(values, n=4)
        results.append({"name": name, "seconds": median, "quartiles": [low, high], "n": len(values)})
        print(f"{name:40s} {median:6.2f} s [{low:.2f}, {high:.2f}] (n={len(values)})")
    if args.json:
        machine = {
            "platform": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        }
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def measure(arms: list[tuple[str, Path, list[str]]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in arms}
    with tempfile.TemporaryDirectory() as directory:
        for index in range(rounds + 1):
            for position, (name, root, words) in enumerate(arms):
                values = {"name": f"{position}.{index}", "directory": directory}
                seconds[name].append(time_of([w.format(**values) for w in words], root))
    return {name: values[1:] for name, values in seconds.items()}


def time_of(words: list[str], root: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode != (2 if words == OURS["misspelt setting"] else 0):
        sys.exit(f"{' '.join(words)} failed in {root}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return seconds


if __name__ == "__main__":
    main()
