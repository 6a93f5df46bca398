"""What a person sees: a progress bar on a terminal, lines elsewhere. Shows what other sinks get, computes nothing."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_BAR_COLUMNS = 30  # with the longest epoch, step and remaining time the line then fits a terminal of 80 columns
_STRAGGLES = 1.5  # a rank that takes this many times the median is worth a line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Falls silent where rich would end the process: `| head` and a pager that was left must not end a training."""
        self.quiet = True
        # What still lies in stdout's buffer must not fail either, at the latest when the interpreter flushes at exit.
        with contextlib.suppress(OSError, ValueError):  # a file without a descriptor has nothing to point elsewhere
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.file.fileno())
            os.close(devnull)


class ConsoleSink:
    def __init__(self, mode: str = "auto"):
        """mode: auto (progress bar on a terminal), or lines."""
        if hasattr(sys.stdout, "reconfigure"):  # a letter that the terminal's encoding lacks must not end the run
            sys.stdout.reconfigure(errors="backslashreplace")
        # Wide enough that a redirected log does not break its lines.
        self.console = _Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        if mode == "auto" and self.console.is_terminal:
            bar = (BarColumn(_BAR_COLUMNS), MofNCompleteColumn())
            # The remaining time of the figures: rich's own estimate would contradict it.
            columns = (TextColumn("{task.description}"), *bar, TextColumn("{task.fields[remaining]}"))
            self.progress = Progress(*columns, console=self.console, transient=True)
        self.task = None

    def log(self, event: str, fields: dict[str, Any]) -> None:
        show = getattr(self, f"_show_{event}", None)
        if show is not None:
            show(fields)

    def _print(self, text: str) -> None:
        self._draw(lambda: self.console.print(text, markup=False))

    def _draw(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:  # the terminal is gone; metrics.jsonl has everything
            self.console.on_broken_pipe()

    def _show_start(self, f: dict) -> None:
        self._print(f"run       {f['run_directory']}")
        self._print(
            f"model     {f['model']}  {f['parameters']:,} parameters, {f['num_classes']} classes, scan: "
            f"{f['scan_backend']}"
        )
        self._print(f"data      {f['train_images']:,} training and {f['eval_images']:,} evaluation images")
        self._print(f"batch     {f['batch_plan']}")
        self._print(
            f"plan      {f['steps_per_epoch']} steps an epoch, {f['total_steps']:,} steps, {f['precision']} on "
            f"{f['device']}, {f'compiled ({mode})' if (mode := f.get('compile_mode')) else 'eager'}"
        )
        if f.get("began_from"):
            self._print(f"weights   {f['began_from']}")
        if f.get("resumed_from"):
            self._print(f"resume    {f['resumed_from']}, step {f['step']}")
        if self.progress is not None:
            self._draw(self.progress.start)
            self.task = self.progress.add_task(
                f"epoch {f['step'] // f['steps_per_epoch']}", total=f["total_steps"], completed=f["step"], remaining=""
            )

    def _show_notice(self, f: dict) -> None:
        self._print(f"note      {f['message']}")

    def _show_warning(self, f: dict) -> None:
        self._print(f"warning   {f['message']}")

    def _show_train(self, f: dict) -> None:
        remaining = _duration(f["eta_seconds"])
        if self.progress is not None:
            bar = dict(description=f"epoch {f['epoch']}", remaining=f"{remaining} left")
            self.progress.update(self.task, completed=f["step"], **bar)
        mfu = f"  MFU {100 * f['speed/mfu']:.0f} %" if "speed/mfu" in f else ""
        self._print(
            f"epoch {f['epoch']}  step {f['step']}/{f['total_steps']}  loss {f['train/loss']:#.5g}  lr "
            f"{f['optimizer.lr']:.2e}  "
            f"{f['speed/img_per_sec']:,.0f} img/s{mfu}  data {100 * f['speed/data_wait_fraction']:.0f} %  "
            f"{f['speed/memory_gib']:.1f} GiB  eta {remaining}"
        )

    def _show_eval(self, f: dict) -> None:
        ema = f"  EMA {f['eval/ema_top1']:.2f} % ({f['eval/ema_top5']:.2f} %)" if "eval/ema_top1" in f else ""
        self._print(
            f"eval      after epoch {f['epoch']}: Top-1 {f['eval/top1']:.2f} % (Top-5 {f['eval/top5']:.2f} %){ema}  "
            f"{f['eval/images']:,} images, {f['eval/img_per_sec']:,.0f} img/s"
        )

    def _show_ranks(self, f: dict) -> None:
        slowest = max(range(len(f["hosts"])), key=lambda r: f["own_seconds"][r])
        median = statistics.median_low(f["own_seconds"])
        if f["own_seconds"][slowest] > _STRAGGLES * median:
            self._print(
                f"slow      rank {slowest} on {f['hosts'][slowest]} takes {1000 * f['own_seconds'][slowest]:.0f} "
                "ms a step "
                f"({1000 * f['data_seconds'][slowest]:.0f} ms of them waiting for data), the others "
                f"{1000 * median:.0f} ms"
            )

    def _show_refused(self, f: dict) -> None:
        ranks = f" on rank {', '.join(map(str, f['ranks']))}" if f["ranks"] else ""
        self._print(
            f"warning   {len(f['steps'])} steps up to {f['step']} were not finite{ranks} and changed nothing; "
            "samples: nonfinite/"
        )

    def _show_rollback(self, f: dict) -> None:
        self._print(f"warning   back to {f['to']}, data goes on at step {f['step']}: {f['cause']}")

    def _show_checkpoint_failed(self, f: dict) -> None:
        self._print(f"warning   {f['path']} could not be written, training goes on: {f['cause']}")

    def _show_stop(self, f: dict) -> None:
        if self.progress is not None:
            self._draw(self.progress.stop)
        cause = f" ({f['cause']})" if f.get("cause") else ""
        self._print(f"{f['status']:<9} at step {f['step']}{cause}: {f['run_directory']}")

    def close(self, *, in_a_hurry: bool = False) -> None:
        if self.progress is not None:
            self._draw(self.progress.stop)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
