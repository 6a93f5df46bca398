"""What is known about the runs of a sweep, read from their run directories; the table of it, and which are missing.

A sweep has a directory of its own, <output_dir>/<sweep name>/, with table.json, table.csv, table.md and logs. It holds
no state: what a run is and which job works on it stands in the run's own directory, so sweeps may share runs.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import socket
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambavision.batch_plan import batch_plan
from mambavision.cluster.points import Point
from mambavision.config_checks import ConfigError
from mambavision.processes import is_alive
from mambavision.run_dir import RunDirectory, check_resume, run_directory, write_atomically
from mambavision.telemetry.sinks import read_events

_RECENT_LINES = 20  # of the log, for the speed

# What SLURM says, as two words. A state that is not here means that the job is over.
_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "PREEMPTED", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    point: str
    status: str  # missing | queued | running | finished | preempted | failed | lost (it ended without a word)
    step: int | None
    total_steps: int | None
    top1: float | None  # %, of the EMA weights where there are some
    img_per_sec: float | None  # of the whole job, median of the last log lines
    job: str | None
    cause: str | None
    run_directory: str

    @property
    def is_wanting(self) -> bool:
        """Neither done nor on its way."""
        return self.status not in ("finished", "queued", "running")


class Sweep:
    def __init__(self, directory: Path, points: Sequence[Point]):
        self.directory, self.points = directory, list(points)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Two submissions at once would start points twice. Raises RuntimeError for the second.

        A file system without locks (Lustre mounted noflock) cannot tell; one warning says so.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(
                    f"another scripts/submit.py works on {self.directory} now; --watch shows its table"
                ) from error
            except OSError as error:
                told = "submit this sweep from one place at a time"
                print(f"warning: no locks in {self.directory} ({error.strerror}); {told}", file=sys.stderr)
            yield

    def rows(self, job_states: dict[str, str]) -> list[Row]:
        """job_states: what the queue says about jobs that are not over, by job id."""
        return [self._row(p, job_states) for p in self.points]

    def _row(self, point: Point, job_states: dict[str, str]) -> Row:
        directory = run_directory(point.cfg)
        run = RunDirectory(Path(directory))
        job = read_job(directory)
        status, events = run.status() or {}, read_events(run.metrics)
        train = [e for e in events if e["event"] == "train"]
        scores = next((e for e in reversed(events) if e["event"] == "eval"), {})
        speeds = [e["speed/img_per_sec"] for e in train[-_RECENT_LINES:]]
        return Row(
            point=point.name or run.path.name,
            status=_status(point, run, status, job, job_states),
            step=train[-1]["step"] if train else status.get("step"),
            total_steps=train[-1]["total_steps"] if train else None,
            top1=scores.get("eval/ema_top1", scores.get("eval/top1")),
            img_per_sec=round(statistics.median(speeds), 1) if speeds else None,
            job=job,
            cause=status.get("cause") if status.get("status") == "failed" else None,
            run_directory=directory,
        )

    def write_table(self, rows: Sequence[Row]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        records = [asdict(r) for r in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
        write_atomically(self.directory / "table.json", json.dumps(records, indent=1) + "\n")
        write_atomically(self.directory / "table.csv", text.getvalue())
        write_atomically(self.directory / "table.md", markdown_table(rows))


def _status(
    point: Point, run: RunDirectory, status: dict[str, Any], job: str | None, job_states: dict[str, str]
) -> str:
    said, state = status.get("status"), job_states.get(job or "")
    if state in _QUEUED:
        return "queued"
    if state in _RUNNING:
        return "running"
    if said == "finished":
        # max_steps names no run: the same directory serves a longer one, which is then not finished yet.
        try:
            stored = (run.stored_config() or {}).get("trainer", {}).get("max_steps")
        except ValueError:  # a config.yaml that says nothing: the next start of this point says so
            return "failed"
        return "finished" if stored == point.cfg.trainer.max_steps else "preempted"
    if said == "running":
        return "running" if _lives_here(status) else "lost"
    return said or ("missing" if job is None else "failed")


def _lives_here(status: dict[str, Any]) -> bool:
    """Whether the process that wrote the status runs on this host; of other hosts only the queue knows."""
    return status.get("host") == socket.gethostname() and is_alive(status["pid"])


def record_job(directory: str, job: str) -> None:
    """Say in the run directory which job works on it, as slurm/train.sbatch does when it starts."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(directory) / "slurm_job", job + "\n")


def read_job(directory: str) -> str | None:
    file = Path(directory) / "slurm_job"
    return file.read_text().strip() if file.exists() else None


def problems_before_start(points: Sequence[Point], world_size: int) -> list[str]:
    """What would make a point refuse to start, found without starting it."""
    problems, seen = [], {}
    for point in points:
        name, directory = point.name or "the run", run_directory(point.cfg)
        if directory in seen:
            problems.append(f"{name}: the same run as {seen[directory]}, {directory}; take one of them out")
        seen[directory] = name
        try:
            batch_plan(point.cfg.trainer.global_batch_size, point.cfg.trainer.micro_batch_size, world_size)
            run = RunDirectory(Path(directory))
            stored = run.stored_config()
            if stored is not None and any(run.checkpoints.glob("step_*.pt")):
                check_resume(stored, point.cfg)
        except (ConfigError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return problems


_COLUMNS = ("point", "status", "step", "Top-1", "img/s", "job", "run directory")


def _cells(row: Row) -> tuple[str, ...]:
    step = "" if row.step is None else f"{row.step}/{row.total_steps}" if row.total_steps else str(row.step)
    top1 = "" if row.top1 is None else f"{row.top1:.2f}"
    speed = "" if row.img_per_sec is None else f"{row.img_per_sec:.0f}"
    status = f"{row.status}: {row.cause[:60]}" if row.cause else row.status
    return (row.point, status, step, top1, speed, row.job or "", row.run_directory)


def text_table(rows: Sequence[Row]) -> str:
    """Aligned with spaces, for a terminal."""
    lines = [_COLUMNS, *(_cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *(_cells(r) for r in rows)]
    return "".join("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in line) + " |\n" for line in lines)
