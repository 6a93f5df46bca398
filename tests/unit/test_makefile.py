"""Every target of the Makefile reaches the tools that it stands for, under the shell that make really uses."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHAT_SETUP_STAMPS = ("requirements.txt", "requirements-dev.txt", "scripts/setup.sh")
LINT = ["ruff check .", "ruff format --check ."]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Makefile and scripts beside a .venv that setup.sh takes for finished; its tools only note how they were called."""
    for name in ("Makefile", *WHAT_SETUP_STAMPS, "scripts/test.sh", "scripts/demo.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("python", "ruff"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n')
        (tools / name).chmod(0o755)
    stamp = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in WHAT_SETUP_STAMPS)).hexdigest()
    (tmp_path / ".venv" / ".setup-stamp").write_text(f"{stamp}  -\n")
    (tmp_path / "calls").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        ("setup", []),
        ("lint", LINT),
        ("test-all", [*LINT, "python -m pytest"]),
        ("test-fast", [*LINT, "python -m pytest tests/unit -m not slow"]),
        ("test-faults", [*LINT, "python -m pytest tests/faults"]),
        ("test-slurm", [*LINT, "python -m pytest tests/slurm"]),
    ],
)
def test_a_target_calls_its_tools(target: str, calls: list[str], repository: Path) -> None:
    subprocess.run(["make", target], cwd=repository, check=True, timeout=300)
    assert [call.strip() for call in (repository / "calls").read_text().splitlines()] == calls


@pytest.mark.parametrize(("target", "last"), [("test", "python -m pytest tests/unit "), ("demo", "python eval.py ")])
def test_a_target_ends_with(target: str, last: str, repository: Path) -> None:
    subprocess.run(
        ["make", target], cwd=repository, env={**os.environ, "HOME": str(repository)}, check=True, timeout=300
    )
    assert (repository / "calls").read_text().splitlines()[-1].startswith(last)


def test_the_demo_scores_the_run_that_its_arguments_ask_for(repository: Path) -> None:
    """train.py names the directory: output_dir= and a run_name with odd characters are not for the script to guess."""
    python = repository / ".venv" / "bin" / "python"
    python.write_text(python.read_text() + 'case "$*" in *--run-dir*) echo "/else where/x" ;; esac\n')
    environment = {**os.environ, "HOME": str(repository)}
    command = ["scripts/demo.sh", "output_dir=/else where", "run_name=x"]
    subprocess.run(command, cwd=repository, env=environment, check=True, timeout=300)
    calls = (repository / "calls").read_text().splitlines()
    assert calls[-1] == "python eval.py checkpoint=/else where/x"
    assert calls[-2].endswith("run_name=demo output_dir=/else where run_name=x")
