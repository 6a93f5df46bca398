"""Weights & Biases as an observer that cannot hurt: its own thread, a bounded queue, offline without key or network.

The run id lives in the run directory, so that a resumed run is the same W&B run; steps already sent are not sent again.
What a kill may have taken from an offline part is sent again from metrics.jsonl, as the same steps with equal values.
"""

from __future__ import annotations

import inspect
import itertools
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambavision.config import LoggerConfig
from mambavision.engine.checkpoint import best_of, list_checkpoints, read_sidecar
from mambavision.run_dir import write_atomically
from mambavision.telemetry.wandb_mode import wandb_mode

_QUEUE_EVENTS = 10_000
_CLOSE_SECONDS, _CLOSE_HURRIED_SECONDS, _UPLOAD_SECONDS = 30.0, 3.0, 900.0
_SENT_EVENTS = ("train", "eval")
_SCORES = ("eval/top1", "eval/ema_top1", "eval/top5", "eval/ema_top5")  # whose best values the summary shows
_GRACE_SECONDS = 15.0  # after init_timeout_seconds, for W&B's own retries and the step to offline
_FAILURES_IN_A_ROW = 20  # of log calls, after which W&B is left alone
_WARNING_SECONDS = 60.0


class WandbSink:
    def __init__(
        self,
        cfg: LoggerConfig,
        directory: Path,
        run_name: str,
        config: dict[str, Any],
        history: list[dict[str, Any]],
        warn: Callable[[str], None],
    ):
        """history: what earlier starts of this run have logged; of this start only later steps are sent."""
        self.cfg, self.directory, self.run_name, self.config, self.warn_run = cfg, directory, run_name, config, warn
        self.newest = _newest(history)
        # Beside the bounded queue, which a long history would fill.
        self.catching_up = [("best", _best_scores(history)), *_unsent(history, directory)]
        self.events: queue.Queue = queue.Queue(_QUEUE_EVENTS)
        self.dropped = 0
        self.last_warning = float("-inf")
        self.waiting_since = time.monotonic()
        self.progress = "starting"  # starting | logging | failed
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, event: str, fields: dict[str, Any]) -> None:
        if event == "stop" and fields["status"] == "finished" and self.cfg.artifacts:
            self._put("artifacts", {})
        if event not in _SENT_EVENTS or _place(fields) <= self.newest[event]:
            return
        self.newest[event] = _place(fields)
        waiting = time.monotonic() - self.waiting_since
        if self.progress == "starting" and waiting > self.cfg.init_timeout_seconds + _GRACE_SECONDS:
            self._warn(f"W&B has not started within {waiting:.0f} s; training does not wait for it")
        self._put(event, _numbers(fields))

    def _put(self, event: str, values: dict[str, float]) -> None:
        try:
            self.events.put_nowait((event, values))
        except queue.Full:
            self.dropped += 1
            self._warn(f"W&B does not keep up: {self.dropped} events dropped; metrics.jsonl has them all")

    def close(self, *, in_a_hurry: bool = False) -> None:
        """Wait a bounded time for what is queued; what W&B has not taken by then is in metrics.jsonl."""
        patience = _UPLOAD_SECONDS if self.cfg.artifacts and self.progress != "failed" else _CLOSE_SECONDS
        seconds = _CLOSE_HURRIED_SECONDS if in_a_hurry else patience
        try:
            self.events.put_nowait(None)
        except queue.Full:
            self.dropped += 1
        self.thread.join(seconds)
        if self.thread.is_alive() or self.dropped:
            self.last_warning = float("-inf")
            missing = self.dropped + self.events.qsize()
            self._warn(
                f"W&B was still busy after {seconds:.0f} s: {missing} events not sent; metrics.jsonl has them all"
            )

    def _work(self) -> None:
        try:
            run = self._start()
            self.progress = "logging"
            failures = 0
            for item in itertools.chain(self.catching_up, iter(self.events.get, None)):
                try:
                    self._send(run, *item)
                    failures = 0
                except Exception as error:
                    failures, self.dropped = failures + 1, self.dropped + 1
                    if failures >= _FAILURES_IN_A_ROW:
                        raise
                    self._warn(f"W&B did not take an event ({_first_line(error)}); metrics.jsonl has it")
            run.finish()
        except Exception as error:  # an observer may fail in any way it likes; the run does not notice
            self.progress = "failed"
            self._warn(
                f"W&B failed ({type(error).__name__}: {_first_line(error)}); training goes on, metrics.jsonl has "
                "everything"
            )
            while self.events.get() is not None:
                pass

    def _send(self, run: Any, event: str, values: dict[str, float]) -> None:
        if event == "artifacts":
            self._upload_checkpoints(run)
            return
        if event in _SENT_EVENTS:
            run.log(values)
        if event in ("eval", "best"):
            self._summarise(run, values)

    def _start(self) -> Any:
        import wandb

        # Anew: a busy machine is long in importing it, which says nothing about W&B.
        self.waiting_since = time.monotonic()
        mode = self._mode(wandb)
        if mode == "online":
            try:
                return self._init(wandb, "online")
            except Exception as error:  # no network, no server, a refused key: all end in the offline mode
                self._warn(
                    f"W&B is out of reach ({_first_line(error)}); logging offline, scripts/inspect_run.py tells "
                    "how to sync"
                )
                wandb.teardown()
        return self._init(wandb, "offline")

    def _mode(self, wandb: Any) -> str:
        wanted = wandb_mode(self.cfg)
        if wanted != "auto":
            return wanted
        return "online" if _has_key(wandb) else "offline"

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
        for key in _SCORES:
            if key in values:
                best = f"best/{key.removeprefix('eval/')}"
                run.summary[best] = max(values[key], run.summary.get(best) or 0.0)

    def _upload_checkpoints(self, run: Any) -> None:
        """The last checkpoint and the best, as versions of one artifact with these aliases; eval.py reads them."""
        import wandb

        paths = list_checkpoints(self.directory / "checkpoints")
        aliases: dict[Path, list[str]] = {}
        for alias, path in (("best", best_of(paths)), ("last", paths[-1] if paths else None)):
            if path is not None:
                aliases.setdefault(path, []).append(alias)
        for path, names in aliases.items():
            artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=read_sidecar(path))
            artifact.add_file(str(path), name=path.name)
            run.log_artifact(artifact, aliases=names)

    def _run_id(self) -> str:
        path = self.directory / "wandb_run_id"
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8])
        return path.read_text().strip()

    def _warn(self, message: str) -> None:
        """At most one a minute."""
        if time.monotonic() - self.last_warning >= _WARNING_SECONDS:
            self.last_warning = time.monotonic()
            self.warn_run(message)


def _place(fields: dict[str, Any]) -> int:
    """Where in the run: by the samples seen, since steps have lower numbers once the global batch has grown."""
    return fields.get("samples_seen", fields["step"])


def _newest(events: list[dict[str, Any]]) -> dict[str, int]:
    return {name: max((_place(e) for e in events if e["event"] == name), default=-1) for name in _SENT_EVENTS}


def _best_scores(events: list[dict[str, Any]]) -> dict[str, float]:
    """An offline part knows nothing of the parts before it, so its summary starts from these."""
    evaluations = [_numbers(e) for e in events if e["event"] == "eval"]
    return {key: max(e[key] for e in evaluations if key in e) for key in _SCORES if any(key in e for e in evaluations)}


def _unsent(history: list[dict[str, Any]], directory: Path) -> list[tuple[str, dict[str, float]]]:
    """What a kill may have taken: an offline part is written 32 KiB at a time, an online one is sent as it comes.

    Only an orderly stop has waited for W&B: a start that fails ends in a hurry.
    """
    if not _last_part_is_offline(directory):
        return []
    stops = [i for i, e in enumerate(history) if e["event"] == "stop" and e.get("status") != "failed"]
    first = stops[-1] + 1 if stops else 0
    newest, unsent = _newest(history[:first]), []
    for event in history[first:]:
        name = event["event"]
        if name in _SENT_EVENTS and _place(event) > newest[name]:  # a resumed start has logged some steps anew
            newest[name] = _place(event)
            unsent.append((name, _numbers({k: v for k, v in event.items() if k != "time"})))
    return unsent


def _last_part_is_offline(directory: Path) -> bool:
    names = [path.name for path in (directory / "wandb").glob("*run-*-*")]
    return bool(names) and max(names, key=lambda name: name.removeprefix("offline-")).startswith("offline-")


def _numbers(fields: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in fields.items() if isinstance(v, (int, float))}


def _has_key(wandb: Any) -> bool:
    """Whether a key is known, without asking anybody for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:  # wandb 0.31; earlier ones tell by the api object
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
