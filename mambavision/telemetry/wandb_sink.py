"""Weights & Biases as an observer that cannot hurt: its own thread, a bounded queue, offline without a key or a network.

The run id lives in the run directory, so that a resumed run is the same W&B run; steps already sent are not sent again.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from mambavision.config import LoggerConfig

_QUEUE_EVENTS = 10_000
_CLOSE_SECONDS = 30.0
_SENT_EVENTS = ("train", "eval")


class WandbSink:
    def __init__(self, cfg: LoggerConfig, directory: Path, run_name: str, config: dict[str, Any], last_step: int):
        """last_step: the newest step that earlier starts of this run have logged; only later ones are sent."""
        self.cfg, self.directory, self.run_name, self.config = cfg, directory, run_name, config
        self.last_step = {event: last_step for event in _SENT_EVENTS}
        self.events: queue.Queue = queue.Queue(_QUEUE_EVENTS)
        self.dropped = 0
        self.warned = False
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, event: str, fields: dict[str, Any]) -> None:
        if event not in _SENT_EVENTS or fields["step"] <= self.last_step[event]:
            return
        self.last_step[event] = fields["step"]
        values = {k: v for k, v in fields.items() if isinstance(v, (int, float))}
        try:
            self.events.put_nowait((event, values))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait a bounded time for what is queued; what W&B has not taken by then is in metrics.jsonl."""
        try:
            self.events.put_nowait(None)
        except queue.Full:
            self.dropped += 1
        self.thread.join(_CLOSE_SECONDS)
        if self.thread.is_alive() or self.dropped:
            waiting = self.events.qsize() + self.dropped
            self._warn(f"W&B did not take {waiting} events within {_CLOSE_SECONDS:.0f} s; metrics.jsonl has them all")

    def _work(self) -> None:
        try:
            run = self._start()
            while (item := self.events.get()) is not None:
                event, values = item
                run.log(values)
                if event == "eval":
                    self._summarise(run, values)
            run.finish()
        except Exception as error:  # an observer may fail in any way it likes; the run does not notice
            self._warn(f"W&B failed ({type(error).__name__}: {error}); training goes on, metrics.jsonl has everything")
            while self.events.get() is not None:
                pass

    def _start(self) -> Any:
        import wandb

        mode = self._mode(wandb)
        if mode == "online":
            try:
                return self._init(wandb, "online")
            except Exception as error:  # no network, no server, a refused key: all end in the offline mode
                self._warn(f"W&B is out of reach ({_first_line(error)}); logging offline, see docs/quickstart.md for the sync command")
                wandb.teardown()
        return self._init(wandb, "offline")

    def _mode(self, wandb: Any) -> str:
        wanted = os.environ.get("WANDB_MODE", "") or self.cfg.wandb
        if wanted in ("online", "offline"):
            return wanted
        has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        return "online" if has_key else "offline"

    def _init(self, wandb: Any, mode: str) -> Any:
        run = wandb.init(
            mode=mode,
            id=self._run_id(),
            resume="allow",
            name=self.run_name,
            project=self.cfg.project,
            entity=self.cfg.entity,
            group=self.cfg.group,
            tags=list(self.cfg.tags) or None,
            dir=str(self.directory),
            config=self.config,
            settings=wandb.Settings(init_timeout=self.cfg.init_timeout_seconds, console="off", silent=True),
        )
        run.define_metric("*", step_metric="step")
        return run

    def _summarise(self, run: Any, values: dict[str, float]) -> None:
        for key in ("eval/top1", "eval/ema_top1", "eval/top5", "eval/ema_top5"):
            if key in values:
                best = f"best/{key.removeprefix('eval/')}"
                run.summary[best] = max(values[key], run.summary.get(best) or 0.0)

    def _run_id(self) -> str:
        path = self.directory / "wandb_run_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        return path.read_text().strip()

    def _warn(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            print(f"warning   {message}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
