"""slurm/train.sbatch --check: what a job would do, without a controller; and containers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_sbatch import ROOT, SBATCH, SETTINGS, submit
from virtual_cluster import VirtualCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def in_a_container(directory: Path) -> tuple[Path, Path]:
    """An env.sh's PYTHON and the directory of its image: a path that has a Python only where the image is mounted."""
    image = directory / "image"
    image.mkdir()
    python = directory / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$INSIDE" = {image} ] || {{ echo not inside >&2; exit 127; }}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return python, image


def test_pyxis_runs_all_python_inside_the_container(cluster: VirtualCluster, tmp_path: Path) -> None:
    python, image = in_a_container(tmp_path)
    environment = tmp_path / "env.sh"
    environment.write_text(f"PYTHON={python}\nSRUN_ARGS=(--export=ALL,INSIDE={image})\n")  # as --container-image does
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    job = submit(cluster, cwd, "trainer.max_steps=10", MAMBAVISION_ENV=str(environment))
    assert job.end() == "COMPLETED", job.output
    assert job.run.status()["step"] == 10


def test_check_runs_in_the_container(tmp_path: Path) -> None:
    python, image = in_a_container(tmp_path)
    wrapper = tmp_path / "apptainer"
    wrapper.write_text('#!/bin/sh\nINSIDE="$1"; export INSIDE; shift; exec "$@"\n')
    wrapper.chmod(0o755)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    env = {**os.environ, "PYTHON": str(python), "NPROC_PER_NODE": "1"}
    command = [str(SBATCH), "--check", *SETTINGS]
    outside = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert outside.returncode == 2 and f"PYTHON={python} is no Python" in outside.stderr, outside.stderr
    env["CONTAINER"] = f"{wrapper} {image}"
    inside = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert inside.returncode == 0, inside.stdout + inside.stderr
    assert f"in: {wrapper} {image}" in inside.stdout and "0 errors" in inside.stdout


def test_check_says_what_it_would_do_without_slurm(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(SBATCH), "--check", *SETTINGS, "trainer.global_batch_size=256"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"4 nodes x 8", done.stdout) and "runs/run: starts from the beginning" in done.stdout
    assert "global batch 256 = 8 images x 32 ranks x 1" in done.stdout
    assert not list(tmp_path.iterdir())  # nothing is written


@pytest.mark.parametrize(
    ("line", "told"),
    [("#SBATCH --gpus-per-node=a100:2 # ours", "4 nodes x 2\n"), ("#SBATCH --exclusive", "set NPROC_PER_NODE=N")],
)
def test_check_reads_what_a_cluster_writes_at_the_head_of_the_script(line: str, told: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sbatch"
    mine.write_text(SBATCH.read_text().replace("#SBATCH --gpus-per-node=8", line))
    done = subprocess.run(
        ["bash", str(mine), "--check", *SETTINGS, "trainer.global_batch_size=256"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "MAMBAVISION_ROOT": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told in done.stdout + done.stderr
