"""What has happened to a run so far, read from its metrics.jsonl and heartbeats: starts, ends, causes, lost work."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambavision.engine.checkpoint import step_of
from mambavision.engine.watchdog import read_heartbeats
from mambavision.telemetry.sinks import read_events


@dataclass
class Start:
    """From one start of the run to the next."""

    time: float  # of its launch
    began: float  # when it had its checkpoint, and its first step was next
    step: int  # where it began
    resumed_from: str | None
    world_size: int
    last_step: int = 0  # the newest step that is known to have been done
    last_time: float = 0.0
    saved_step: int = 0  # the newest checkpoint
    ending: str = "killed"  # finished, preempted, failed; killed where it could not say anything
    cause: str | None = None
    lost_steps: int = 0  # done, but done again by the next start
    useful_seconds: float = 0.0  # spent on training steps that counted
    saved_as: int = 0  # `step` as the start before counted: a larger global batch has fewer steps
    no_more: bool = False  # the next launch was refused, because the starts up to this one made no progress
    events: list[dict[str, Any]] = field(default_factory=list)


def starts(directory: Path) -> list[Start]:
    """Oldest first."""
    found: list[Start] = []
    launched: list[dict[str, Any]] | None = None  # what a launch has said before its start: no business of the last one
    for event in read_events(directory / "metrics.jsonl"):
        if event["event"] == "launch":
            launched = [event]
        elif event["event"] == "start":
            found.append(_begun(event, launched or []))
            launched = None
        elif launched is not None:
            launched.append(event)
        if found and event["event"] == "stop":  # of a refused launch; earlier versions logged none before it
            found[-1].no_more |= NO_PROGRESS in (event.get("cause") or "")
        if launched is None and found:
            _add(found[-1], event)
    _add_heartbeats(found, directory, until=launched[0]["time"] if launched else math.inf)
    for start, following in itertools.pairwise(found):
        start.lost_steps = max(0, start.last_step - following.saved_as)
    for start in found:
        start.useful_seconds = _seconds_up_to(start, start.last_step - start.lost_steps)
    return found


def _seconds_up_to(start: Start, counted: int) -> float:
    """Spent on its steps up to `counted`, as its `train` events say; evaluations and checkpoints are no steps."""
    seconds, reached, each = 0.0, start.step, None
    for event in start.events:
        if event["event"] == "train" and "speed/step_seconds" in event:
            each = event["speed/step_seconds"]
            seconds += max(0, min(event["step"], counted) - reached) * each
            reached = max(reached, event["step"])
    if each is None:  # it ended before a first interval was logged
        each = (start.last_time - start.began) / max(start.last_step - start.step, 1)
    seconds += max(0, counted - reached) * each
    return min(seconds, start.last_time - start.began)


def _begun(event: dict[str, Any], launched: list[dict[str, Any]]) -> Start:
    step, resumed_from = event["step"], event.get("resumed_from")
    launch = launched[0]["time"] if launched else event["time"]
    start = Start(launch, event["time"], step, resumed_from, event.get("world_size", 1), events=launched)
    start.last_step = start.saved_step = step
    start.saved_as = step_of(Path(resumed_from)) if resumed_from else step
    return start


def _add(start: Start, event: dict[str, Any]) -> None:
    start.events.append(event)
    start.last_time = event["time"]
    start.last_step = max(start.last_step, event.get("step") or 0)
    if event["event"] == "checkpoint":
        start.saved_step = event["step"]
    elif event["event"] == "stop":
        start.ending, start.cause = event["status"], event.get("cause")


def _add_heartbeats(found: list[Start], directory: Path, *, until: float) -> None:
    """The last start's heartbeats know steps that were never logged, and whether it still runs.

    until: when a later launch began, which has not come to its start (yet).
    """
    beats = [b for b in read_heartbeats(directory) if found and found[-1].time <= b["time"] < until]
    if beats:
        last = found[-1]
        last.last_step = max(last.last_step, *(b["step"] for b in beats))
        last.last_time = max(last.last_time, *(b["time"] for b in beats))
        if last.ending == "killed" and time.time() - max(b["time"] for b in beats) < 60:
            last.ending = "running"


def starts_without_progress(directory: Path, step: int) -> list[Start]:
    """The newest starts that began at `step` and ended by a fault before they had saved anything newer.

    A stop on notice is no fault, and a start that was refused for this very reason begins the count anew.
    """
    counted: list[Start] = []
    for start in reversed(starts(directory)):
        if start.step != step or start.saved_step > step or start.no_more:
            break
        if start.ending not in ("preempted", "finished"):
            counted.append(start)
    return counted


NO_PROGRESS = "no progress over several starts"


def no_progress_message(counted: list[Start], step: int, steps_per_epoch: int) -> str:
    reached = max(s.last_step for s in counted)
    causes = "; ".join(dict.fromkeys(s.cause or "killed without a word" for s in counted))
    return (
        f"{NO_PROGRESS}: the last {len(counted)} all began at step {step} and ended by a fault at step "
        f"{reached} at the latest "
        f"(epoch {reached // steps_per_epoch}, step {reached % steps_per_epoch} of it) without a newer "
        f"checkpoint. Causes: {causes}. "
        "Mend the cause, then repeat the command"
    )
