#!/usr/bin/env python
"""What has happened to a run: its starts, how each ended and why, lost steps, goodput, checkpoints, W&B.

    python scripts/inspect_run.py runs/NAME [--json]

Goodput is the share of the time from each launch to its last sign of life that went into training steps which counted.
The rest is starting up, evaluations, checkpoints, and steps that had to be done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mambavision.engine import checkpoint
from mambavision.run_dir import RunDirectory
from mambavision.run_history import Start, starts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    args = parser.parse_args(arguments)
    if not (args.run / "metrics.jsonl").exists():
        print(f"error: {args.run} is not a run directory: it has no metrics.jsonl", file=sys.stderr)
        return 2
    report = inspect(args.run)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 0


def inspect(directory: Path) -> dict[str, Any]:
    """Everything that is shown, as plain values."""
    history = starts(directory)
    spent = sum(s.last_time - s.time for s in history)
    paths = checkpoint.list_checkpoints(directory / "checkpoints")
    problems = {p.name: checkpoint.verify(p) for p in paths}
    return {
        "run": str(directory),
        "status": RunDirectory(directory).status(),
        "starts": [_start_record(s) for s in history],
        "lost_steps": sum(s.lost_steps for s in history),
        "goodput": sum(s.useful_seconds for s in history) / spent if spent else None,
        "hours": spent / 3600,
        "checkpoints": [{"name": n, "valid": reason is None, "reason": reason} for n, reason in problems.items()],
        "best": _best(history),
        "nonfinite_steps": sorted(
            {s for h in history for e in h.events if e["event"] == "refused" for s in e["steps"]}
        ),
        "warnings": sum(e["event"] == "warning" for h in history for e in h.events),
        "wandb": _wandb(directory),
    }


def _start_record(start: Start) -> dict[str, Any]:
    return {
        "time": start.time,
        "seconds": start.last_time - start.time,
        "ranks": start.world_size,
        "first_step": start.step,
        "last_step": start.last_step,
        "ending": start.ending,
        "cause": start.cause,
        "lost_steps": start.lost_steps,
        "rollbacks": sum(e["event"] == "rollback" for e in start.events),
        "checkpoint_failures": sum(e["event"] == "checkpoint_failed" for e in start.events),
    }


def _best(history: list[Start]) -> dict[str, Any] | None:
    """By the score that decides which checkpoint is kept as the best: the moving average's, where there is one."""
    evaluations = {
        e["step"]: e for s in history for e in s.events if e["event"] == "eval"
    }  # of one done twice, the later
    scores = [
        {
            "step": e["step"],
            "epoch": e["epoch"],
            "weights": "EMA" if "eval/ema_top1" in e else "raw",
            "top1": e.get("eval/ema_top1", e["eval/top1"]),
        }
        for e in evaluations.values()
    ]
    return max(scores, key=lambda s: (s["top1"], s["step"]), default=None)


def _wandb(directory: Path) -> dict[str, Any] | None:
    """The id, and what to type to send offline parts of the run."""
    id_file = directory / "wandb_run_id"
    if not id_file.exists():
        return None
    offline = [p for p in sorted((directory / "wandb").glob("offline-run-*")) if not list(p.glob("*.synced"))]
    sync = f"wandb sync {' '.join(map(str, offline))}" if offline else None
    return {"id": id_file.read_text().strip(), "sync": sync}


def show(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    status = report["status"] or {"status": "unknown", "step": 0}
    console.print(f"{report['run']}: {status['status']} at step {status['step']}", markup=False)
    if status.get("cause"):
        console.print(f"cause     {status['cause']}", markup=False)
    table = Table("start", "ranks", "steps", "lasted", "ended", "lost", "cause")
    for start in report["starts"]:
        extras = [f"{start[k]} {k.replace('_', ' ')}" for k in ("rollbacks", "checkpoint_failures") if start[k]]
        table.add_row(
            time.strftime("%m-%d %H:%M:%S", time.localtime(start["time"])),
            str(start["ranks"]),
            f"{start['first_step']} to {start['last_step']}",
            _duration(start["seconds"]),
            start["ending"],
            str(start["lost_steps"] or ""),
            "; ".join(filter(None, [_short(start["cause"]), *extras])),
        )
    if report["starts"]:
        console.print(table)
    goodput = "" if report["goodput"] is None else f", goodput {100 * report['goodput']:.1f} %"
    console.print(
        f"lost      {report['lost_steps']} steps over {len(report['starts'])} starts{goodput} of "
        f"{report['hours']:.2f} h"
    )
    for item in report["checkpoints"]:
        console.print(f"kept      {item['name']}: {'valid' if item['valid'] else item['reason']}", markup=False)
    if report["best"]:
        best = report["best"]
        console.print(
            f"best      {best['weights']} Top-1 {best['top1']:.2f} % after epoch {best['epoch']} (from 0), step {best['step']}"
        )
    if report["nonfinite_steps"]:
        console.print(
            f"refused   {len(report['nonfinite_steps'])} steps that were not finite: nonfinite/ has their samples"
        )
    if report["wandb"] and report["wandb"]["sync"]:
        console.print(
            f"W&B       run {report['wandb']['id']} has offline parts; to send them:\n  {report['wandb']['sync']}"
        )


def _short(cause: str | None) -> str:
    return (cause or "").split("\n")[0][:100]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


if __name__ == "__main__":
    raise SystemExit(main())
