"""A sweep as a job array on a real controller: a failing point hurts no other, and is all that is submitted again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from virtual_cluster import VirtualCluster

ROOT = Path(__file__).resolve().parents[2]
POINTS = ["experiment=tiny", "logger=jsonl", "run_name=s", "trainer.max_steps=10", "seed=0,1,2,3"]
OPTIONS = ["--nodes=1", "--nproc-per-node=1", "--max-running=2", "--max-restarts=0", "--cpus-per-task=2", "--time=30"]

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def submit(cluster: VirtualCluster, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "submit.py"), "-m", *POINTS, *words]
    environment = {**cluster.environment, "PREFLIGHT": "0", "PYTHON": sys.executable}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


def statuses(cwd: Path) -> list[str]:
    return [row["status"] for row in json.loads((cwd / "runs" / "s" / "table.json").read_text())]


def test_a_sweep_of_four_with_one_failing_gives_three_results_and_then_the_fourth(
    cluster: VirtualCluster, tmp_path: Path
) -> None:
    obstacle = tmp_path / "runs" / "s" / "seed=2" / "checkpoints"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the run needs a directory")
    first = submit(cluster, tmp_path, *OPTIONS)
    assert first.returncode == 0 and "4 submitted, 0 left alone" in first.stdout, first.stdout + first.stderr
    again = submit(cluster, tmp_path, *OPTIONS)  # at once: everything is on its way
    assert "0 submitted, 4 left alone" in again.stdout, again.stdout + again.stderr
    jobs = [(tmp_path / "runs" / "s" / f"seed={seed}" / "slurm_job").read_text().strip() for seed in range(4)]
    ends = [cluster.wait_for_end(job, 300) for job in jobs]
    assert ends == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]

    obstacle.unlink()
    second = submit(cluster, tmp_path, *OPTIONS)
    assert "1 submitted, 3 left alone" in second.stdout, second.stdout + second.stderr
    assert submit(cluster, tmp_path, *OPTIONS, "--watch").returncode == 0
    assert statuses(tmp_path) == ["finished"] * 4
    rows = json.loads((tmp_path / "runs" / "s" / "table.json").read_text())
    assert all(row["top1"] is not None and row["img_per_sec"] > 0 for row in rows)
