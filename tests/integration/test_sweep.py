"""Sweeps, both ways: train.py -m in one process group, scripts/submit.py with a process for each point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambavision.run_dir import RunDirectory
from tests.integration.torchrun import ROOT, train

pytestmark = pytest.mark.slow
SHORT = ["experiment=tiny", "logger=jsonl", "trainer.max_steps=10", "data.synthetic_eval_samples=32"]


def test_a_sweep_under_torchrun_finishes_every_point_in_its_own_directory(tmp_path: Path) -> None:
    words = ["-m", *SHORT, f"output_dir={tmp_path}", "run_name=lr", "optimizer.lr=1e-3,2e-3"]
    done = train(*words, ranks=2, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("point")]
    assert told == ["point     1: optimizer.lr=0.001", "point     2: optimizer.lr=0.002"], "by rank 0 alone"
    points = sorted(tmp_path.glob("lr/*"))
    assert [p.name for p in points] == ["optimizer.lr=0.001", "optimizer.lr=0.002"]
    for point, lr in zip(points, (1e-3, 2e-3)):
        run = RunDirectory(point)
        assert run.status()["status"] == "finished" and run.stored_config()["optimizer"]["lr"] == lr
    # The points are plain runs: scripts/submit.py knows them.
    known = submit(tmp_path, "run_name=lr", "optimizer.lr=1e-3,2e-3", "--local", "--watch")
    assert known.returncode == 0 and known.stdout.count("finished") == 2, known.stdout + known.stderr


def submit(directory: Path, *words: str, sweep: bool = True) -> subprocess.CompletedProcess:
    flag = ["-m"] if sweep else []
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "submit.py"), *flag, *SHORT, f"output_dir={directory}", *words],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_failing_point_hurts_no_other_and_is_the_only_one_started_again(tmp_path: Path) -> None:
    words = ["run_name=s", "seed=0,1,2", "--local", "--max-running=2"]
    obstacle = tmp_path / "s" / "seed=1" / "checkpoints"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the run needs a directory")
    first = submit(tmp_path, *words)
    table = json.loads((tmp_path / "s" / "table.json").read_text())
    assert first.returncode == 1, first.stdout + first.stderr
    assert [r["status"] for r in table] == ["finished", "failed", "finished"]
    assert all(r["top1"] is not None and r["img_per_sec"] > 0 for r in table if r["status"] == "finished")

    obstacle.unlink()
    second = submit(tmp_path, *words)
    assert second.returncode == 0 and "1 to run, 2 left alone" in second.stdout, second.stdout + second.stderr
    assert [r["status"] for r in json.loads((tmp_path / "s" / "table.json").read_text())] == ["finished"] * 3


def test_nothing_is_started_if_one_point_is_wrong(tmp_path: Path) -> None:
    done = submit(tmp_path, "optimizer.lr=1e-3,abc", "--local")
    assert done.returncode == 2 and "1 of 2 points cannot run" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fp16 is not refused")
@pytest.mark.parametrize("words", [("trainer.precision=fp16",), ("-m", "trainer.precision=fp16,fp32")])
def test_a_run_that_refuses_to_start_says_why_in_the_table(words: tuple[str, ...], tmp_path: Path) -> None:
    done = submit(tmp_path, *words, "run_name=x", "--local", sweep=False)
    assert done.returncode == 1 and "failed: precision fp16 needs a GPU" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("running") == len(words)  # a plain run is shown as running, too
