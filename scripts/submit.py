#!/usr/bin/env python
"""Submit runs to SLURM, or run them here: checks every point first, starts only what is missing, keeps a table.

    scripts/submit.py model=mambavision_b data.path=DIR             one run, slurm/train.sbatch
    scripts/submit.py -m model=mambavision_t,mambavision_s optimizer.lr=2e-3,5e-3 data.path=DIR --max-running=2
    scripts/submit.py -m sweep=lr data.path=DIR --nodes=1 --partition=gpu --time=12:00:00    what it does not know: to sbatch
    scripts/submit.py -m ... --local --nproc-per-node=2             torchrun on this machine, point after point
    scripts/submit.py -m ... --watch                                the table, live; starts nothing
    scripts/submit.py -m ... --check                                all checks, starts nothing

Give the same command again at any time: finished, running and waiting points are left alone, the others continue.
Exit codes: 0 everything is finished, running or waiting; 1 some points have failed; 2 refused; 75 stopped on the way.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mambavision.cluster import doctor, points, slurm
from mambavision.cluster.local import LocalRuns
from mambavision.cluster.points import Point
from mambavision.cluster.sweep import Row, Sweep, problems_before_start, record_job, text_table
from mambavision.compose import check_overrides
from mambavision.config import TrainConfig
from mambavision.run_dir import run_directory

WATCH_SECONDS = 5.0


def main() -> int:
    args, words = parse(sys.argv[1:])
    try:
        check_same_repository()
        is_sweep, words = points.split_multirun(words)
        overrides, options = split_options(words)
        overrides = check_overrides(overrides, TrainConfig)  # the sweep's name is made of the words as they are meant
        chosen = points.expand(overrides) if is_sweep else [points.single(overrides)]
        sweep = Sweep(sweep_directory(chosen, overrides, is_sweep), chosen)
        if args.watch:
            return watch(sweep, args)
        if options and args.local:
            raise ValueError(f"{' '.join(options)}: not an option of this program, and there is no sbatch with --local")
        if not args.local and not slurm.is_available():
            raise ValueError("there is no sbatch here; --local runs the points on this machine")
        check(chosen, args, options)
        if args.check:
            return 0
        with sweep.locked():
            return run_here(sweep, args) if args.local else submit(sweep, args, options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--max-running", type=int, help="points that run at once (default: as SLURM lets; --local: 1)")
    parser.add_argument("--nodes", type=int, help="nodes of each run (default: slurm/train.sbatch's)")
    parser.add_argument("--nproc-per-node", type=int, help="ranks of a node (default: its GPUs)")
    parser.add_argument("--max-restarts", type=int, help="faults without progress before a job gives up (3)")
    parser.add_argument("--local", action="store_true", help="run on this machine instead of submitting to SLURM")
    parser.add_argument("--watch", action="store_true", help="show the table until all points have ended")
    parser.add_argument("--check", action="store_true", help="check every point, start nothing")
    return parser.parse_known_args(arguments)


def check_same_repository() -> None:
    """Raises ValueError where Python imports another clone than this script's: that one's code would be submitted."""
    here = Path(__file__).resolve().parents[1]
    if here != slurm.ROOT:
        raise ValueError(
            f"this is the submit.py of {here}, but the mambavision that {sys.executable} imports is that of {slurm.ROOT}; "
            f"use the .venv of {here} (scripts/setup.sh makes it), or set PYTHONPATH={here}"
        )


def split_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(settings, sbatch's options). Raises ValueError where an option does not hold its value itself."""
    words = [w for w in words if w != "--"]
    for before, word in zip(("", *words), words):
        if before.startswith("--") and "=" not in before and not word.startswith(("-", "~")) and "=" not in word:
            raise ValueError(f"{before} {word}: write it as one word, {before}={word}")
        if word.startswith("-") and not word.startswith("--"):
            raise ValueError(f"{word}: write sbatch's options by their long names, as --partition=gpu")
    return [w for w in words if not w.startswith("--")], [w for w in words if w.startswith("--")]


def sweep_directory(chosen: Sequence[Point], overrides: Sequence[str], is_sweep: bool) -> Path:
    if not is_sweep:
        return Path(run_directory(chosen[0].cfg))
    return Path(chosen[0].cfg.output_dir) / points.sweep_name(overrides)


def ranks_per_node(args: argparse.Namespace, options: Sequence[str] = ()) -> int:
    """As many as slurm/train.sbatch or torchrun will start."""
    if args.nproc_per_node:
        return args.nproc_per_node
    if args.local:
        import torch

        return torch.cuda.device_count() or 1
    if given := os.environ.get("NPROC_PER_NODE"):
        return int(given)
    gpus = [o.split("=", 1)[1] for o in options if o.startswith("--gpus-per-node=")]
    return int((gpus or [slurm.script_default("gpus-per-node")])[-1].rsplit(":", 1)[-1])  # 8 or a100:8


def check(chosen: Sequence[Point], args: argparse.Namespace, options: Sequence[str]) -> None:
    """Raises ValueError, before anything is started, if any point cannot run."""
    nodes = 1 if args.local else args.nodes or int(slurm.script_default("nodes"))
    ranks = ranks_per_node(args, options)
    problems = problems_before_start(chosen, nodes * ranks)
    for finding in doctor.before_submission([p.cfg for p in chosen]):
        if finding.level == "error":
            problems.append(f"{finding.name}: {finding}")
        elif finding.level == "warning":
            print(finding.line(), file=sys.stderr)
    if problems:
        raise ValueError("\n".join(["nothing was started:", *problems]))
    print(f"{len(chosen)} point{'s' * (len(chosen) > 1)} checked, for {nodes} node(s) x {ranks} rank(s) each")


def submit(sweep: Sweep, args: argparse.Namespace, options: list[str]) -> int:
    rows = sweep.rows(slurm.job_states())
    wanting = [p for p, row in zip(sweep.points, rows) if row.is_wanting]
    if wanting:
        if args.nodes:
            options = [f"--nodes={args.nodes}", *options]
        environment = {"MAMBAVISION_ROOT": str(slurm.ROOT)}
        if args.nproc_per_node:
            environment["NPROC_PER_NODE"] = str(args.nproc_per_node)
            if not any(o.startswith(("--gpus", "--gres=gpu")) for o in options):
                options = [f"--gpus-per-node={args.nproc_per_node}", *options]
        if args.max_restarts is not None:
            environment["MAX_RESTARTS"] = str(args.max_restarts)
        jobs = slurm.submit(
            wanting, options=options, environment=environment, directory=sweep.directory, max_running=args.max_running
        )
        for point, job in zip(wanting, jobs):
            record_job(run_directory(point.cfg), job)
    print(f"{len(wanting)} submitted, {len(rows) - len(wanting)} left alone; table in {sweep.directory}")
    show(sweep, sweep.rows(slurm.job_states()))
    return 0


def run_here(sweep: Sweep, args: argparse.Namespace) -> int:
    wanting = [p for p, row in zip(sweep.points, sweep.rows({})) if row.is_wanting]
    logs = sweep.directory / "logs"
    print(
        f"{len(wanting)} to run, {len(sweep.points) - len(wanting)} left alone; table in {sweep.directory}, output in {logs}"
    )
    shown: list[Row] = []

    def show_changes(running: set[str]) -> None:
        rows = sweep.rows({})
        rows = [replace(r, status="running") if p.name in running else r for p, r in zip(sweep.points, rows)]
        sweep.write_table(rows)
        for old, new in zip(shown or [None] * len(rows), rows):
            if old is None or old.status != new.status:
                print(f"  {new.point or new.run_directory}: {new.status}", flush=True)
        shown[:] = rows

    with LocalRuns(wanting, nproc_per_node=ranks_per_node(args), max_running=args.max_running or 1, logs=logs) as runs:
        runs.run(show_changes)
    rows = [_with_refusal(row, point, runs) for point, row in zip(sweep.points, sweep.rows({}))]
    show(sweep, rows)
    if runs.notice is not None:
        print("stopped on the way; the same command continues")
        return 75
    return int(any(row.is_wanting for row in rows))


def _with_refusal(row: Row, point: Point, runs: LocalRuns) -> Row:
    """A run that was refused before it had a directory has said so in its output only."""
    if runs.exit_codes.get(point.name) and row.status in ("missing", "lost"):
        return replace(row, status="failed", cause=runs.last_error(point))
    return row


def watch(sweep: Sweep, args: argparse.Namespace) -> int:
    """Redraw the table until no point is on its way any more."""
    clear = "\033[2J\033[H" if sys.stdout.isatty() else ""
    previous: list[Row] = []
    while True:
        rows = sweep.rows({} if args.local else slurm.job_states())
        if rows != previous:
            print(clear, end="")
            show(sweep, rows)
        if not any(row.status in ("queued", "running") for row in rows):
            return int(any(row.is_wanting for row in rows))
        previous = rows
        time.sleep(WATCH_SECONDS)


def show(sweep: Sweep, rows: Sequence[Row]) -> None:
    sweep.write_table(rows)
    print(text_table(rows), flush=True)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except BrokenPipeError:  # ... | head
        os._exit(1)
