"""Talking to SLURM through its own commands: sbatch and squeue. Needs no accounting database."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mambavision.cluster.points import Point

ROOT = Path(__file__).resolve().parents[2]
BATCH_SCRIPT = ROOT / "slurm" / "train.sbatch"
_SECONDS = 120  # a busy controller may take a while; longer is a fault


def is_available() -> bool:
    return shutil.which("sbatch") is not None


def script_default(option: str) -> str:
    """What slurm/train.sbatch asks for itself, e.g. nodes: "4". A cluster's users write their own numbers there."""
    for line in BATCH_SCRIPT.read_text().splitlines():
        if line.startswith(f"#SBATCH --{option}="):
            return line.split("=", 1)[1].split()[0]
    raise ValueError(f"{BATCH_SCRIPT} has no line #SBATCH --{option}=N; give --{option}=N")


def job_states() -> dict[str, str]:
    """This user's jobs that are not over, e.g. {"17": "RUNNING", "18_3": "PENDING"}.

    Raises:
        RuntimeError: SLURM does not answer. Nothing may be submitted then, as it might be running already.
    """
    lines = _run(["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T"]).splitlines()
    return dict(line.strip().split("|", 1) for line in lines if "|" in line)


def submit(
    points: Sequence[Point],
    *,
    options: Sequence[str],
    environment: dict[str, str],
    directory: Path,
    max_running: int | None,
) -> list[str]:
    """One job for each point, as a job array of which `max_running` run at once. Returns the job ids, in order.

    Each element is a job of its own: it is requeued, fails and is cancelled alone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "logs").mkdir(exist_ok=True)
    if len(points) == 1 and not points[0].name:
        out = f"--output={directory}/logs/slurm-%j.out"
        words = ["sbatch", "--parsable", out, *options, str(BATCH_SCRIPT), *points[0].overrides]
        return [_job_id(_run(words, environment))]
    # The file must not change under jobs that still wait, so each submission has its own.
    number = 1 + max((int(p.stem.split("-")[1]) for p in directory.glob("points-*.txt")), default=0)
    lines = directory / f"points-{number}.txt"
    lines.write_text("".join(shlex.join(p.overrides) + "\n" for p in points))
    limit = f"%{max_running}" if max_running else ""
    array = [f"--array=0-{len(points) - 1}{limit}", f"--output={directory}/logs/slurm-%A_%a.out"]
    words = ["sbatch", "--parsable", *array, *options, str(BATCH_SCRIPT), "--points", str(lines.resolve())]
    job = _job_id(_run(words, environment))
    return [f"{job}_{i}" for i in range(len(points))]


def _job_id(answer: str) -> str:
    return answer.strip().splitlines()[-1].split(";")[0]  # "17" or "17;cluster"


def _run(words: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            words, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{words[0]} has not answered for {_SECONDS} s; try scontrol ping") from error
    if done.returncode:
        raise RuntimeError(f"{words[0]} refuses: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
