"""Starts train.py as users do, as real processes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train(*overrides: str, ranks: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=RANKS train.py OVERRIDES` (plain python for one rank), output captured.

    With several ranks {RANK} in an override is the rank, for what a user may get wrong on one node alone.
    """
    launcher = [sys.executable]
    words = [str(ROOT / "train.py"), *overrides]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    if any("{RANK}" in word for word in words):
        line = shlex.join([sys.executable, *words]).replace("{RANK}", "'$RANK'")
        launcher, words = [*launcher, "--no-python"], ["bash", "-c", line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [*launcher, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
