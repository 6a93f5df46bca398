"""Starts train.py as users do, as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train(*overrides: str, ranks: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=RANKS train.py OVERRIDES` (plain python for one rank), output captured."""
    python = [sys.executable]
    launcher = (
        [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else python
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
