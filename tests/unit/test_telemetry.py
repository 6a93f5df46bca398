"""Sinks: metrics.jsonl survives kills and full disks, the console shows, meters add up."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from mambavision.config import LoggerConfig
from mambavision.engine.reporting import evaluations_ahead
from mambavision.telemetry import wandb_sink
from mambavision.telemetry.console import ConsoleSink
from mambavision.telemetry.meters import StepMeters
from mambavision.telemetry.sinks import JsonlSink, LogForwarder, Telemetry, read_events
from mambavision.telemetry.wandb_mode import wandb_mode
from mambavision.telemetry.wandb_sink import WandbSink


def test_a_line_cut_short_by_a_kill_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"event": "tra')
    sink = JsonlSink(path)
    sink.log("train", {"step": 3})
    sink.close()
    assert [e["step"] for e in read_events(path)] == [1, 3]


def test_a_full_disk_costs_lines_and_one_warning(capsys: pytest.CaptureFixture) -> None:
    sink = JsonlSink(Path("/dev/full"))
    for step in range(5):
        sink.log("train", {"step": step})
    sink.close()
    assert sink.lost == 5
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log("train", {"step": 1})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "old.jsonl")
    sink.log("train", {"step": 2})
    sink.close()
    assert [e["step"] for e in read_events(tmp_path / "metrics.jsonl")] == [2]


def test_values_that_json_does_not_know_are_readable_by_every_parser(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log("train", {"train/loss": float("nan"), "train/grad_norm": float("inf"), "path": tmp_path})
    sink.close()
    refuse = lambda text: pytest.fail(f"{text} is no JSON")  # noqa: E731
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["train/loss"], record["train/grad_norm"]) == ("nan", "inf")


def test_warnings_of_the_data_path_reach_the_log(tmp_path: Path) -> None:
    telemetry = Telemetry([JsonlSink(tmp_path / "metrics.jsonl")])
    with LogForwarder(telemetry):
        logging.getLogger("data.corrupt").warning("image %s cannot be read", "x.jpg")
        logging.getLogger("data.corrupt").info("not this")
    logging.getLogger("data.corrupt").warning("nor this, any more")
    telemetry.close()
    assert [e["message"] for e in read_events(tmp_path / "metrics.jsonl")] == ["image x.jpg cannot be read"]


def test_a_reader_of_the_console_that_leaves_does_not_end_the_training() -> None:
    program = """
import sys
from mambavision.telemetry.console import ConsoleSink
sink = ConsoleSink()
sys.stdin.readline()
for _ in range(3):
    sink.log("notice", {"message": "nobody reads this"})
print("nor this")
sink.close()
"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    process.stdout.close()
    _, errors = process.communicate(b"go\n", timeout=300)
    assert (process.returncode, errors) == (0, b"")


def test_a_letter_that_the_terminal_does_not_know_does_not_end_the_training() -> None:
    program = 'from mambavision.telemetry.console import ConsoleSink; ConsoleSink().log("notice", {"message": "größe"})'
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, b"note      gr\\xf6\\xdfe\n"), done.stderr


def test_the_bar_shows_step_and_remaining_time_on_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    sink = ConsoleSink()
    words = ("run_directory", "model", "num_classes", "scan_backend", "batch_plan", "precision", "device")
    counts = dict(parameters=1, train_images=1, eval_images=1, steps_per_epoch=1251, total_steps=375300, step=0)
    sink.log("start", {**dict.fromkeys(words, ""), **counts})
    figures = {"train/loss": 2.0, "optimizer.lr": 1e-3}
    speed = {f"speed/{name}": 0.5 for name in ("img_per_sec", "data_wait_fraction", "memory_gib")}
    progress = dict(epoch=299, step=375299, total_steps=375300, eta_seconds=59 * 60 + 59)
    sink.log("train", {**progress, **figures, **speed})
    sink.close()
    shown = Console(width=80, file=io.StringIO(), color_system=None)
    shown.print(sink.progress.get_renderable())
    (line,) = shown.file.getvalue().splitlines()
    assert line.startswith("epoch 299 ") and line.rstrip().endswith(" 375299/375300 59 min 59 s left")
    assert "loss 2.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("configured", "variables", "mode"),
    [
        ("auto", {}, "auto"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "off"),
        ("auto", {"WANDB_DISABLED": "false"}, "auto"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("offline", {"WANDB_MODE": "online"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "online"),
        ("off", {"WANDB_MODE": "online"}, "off"),
    ],
)
def test_wandb_variables_decide_where_the_configuration_leaves_it_open(
    configured: str, variables: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(LoggerConfig(wandb=configured)) == mode


class _WandbRun:
    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self.logged: list[dict] = []
        self.log = self.logged.append
        self.define_metric = self.finish = lambda *args, **kwargs: None


def _resume_offline(directory: Path, history: list[dict], monkeypatch: pytest.MonkeyPatch) -> _WandbRun:
    run = _WandbRun()
    fake = SimpleNamespace(init=lambda **settings: run, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink(LoggerConfig(wandb="offline"), directory, "run", {}, history, warn=pytest.fail)
    for step in (4, 8):
        sink.log("train", {"step": step, "samples_seen": 10 * step, "train/loss": float(step)})
    sink.close()
    return run


def _train(*steps: int) -> list[dict]:
    return [{**_at(step), "event": "train", "time": 1.0, "train/loss": float(step)} for step in steps]


def _at(step: int) -> dict:
    return {"step": step, "samples_seen": 10 * step}


_STOPPED = [*_train(1, 2), {"event": "eval", **_at(2), "eval/top1": 50.0}, {"event": "stop", "status": "preempted"}]
_KILLED = [*_train(2, 3, 4), {"event": "eval", **_at(4), "eval/top1": 40.0}, *_train(3, 4, 5)]


@pytest.mark.parametrize(
    ("part", "history", "sent"),
    [
        ("offline-run-20260101_000000-x", [*_STOPPED, *_KILLED], [3, 4, 4, 5, 8]),
        ("offline-run-20260101_000000-x", [*_KILLED, {"event": "stop", "status": "failed"}], [2, 3, 4, 4, 5, 8]),
        ("offline-run-20260101_000000-x", [*_KILLED, *_STOPPED], [8]),
        ("run-20260102_000000-x", [*_STOPPED, *_KILLED], [8]),
    ],
)
def test_what_a_kill_took_from_an_offline_wandb_is_sent_by_the_next_start(
    part: str, history: list[dict], sent: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("offline-run-20251231_000000-x", part):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    run = _resume_offline(tmp_path, history, monkeypatch)
    assert [values["step"] for values in run.logged] == sent
    assert all("time" not in values for values in run.logged)


def test_wandb_gets_the_steps_of_a_larger_batch_though_they_have_lower_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [{"event": "train", "step": step, "samples_seen": step, "train/loss": 1.0} for step in (10, 20, 30)]
    assert [v["step"] for v in _resume_offline(tmp_path, before, monkeypatch).logged] == [4, 8]


def test_an_offline_summary_keeps_the_best_of_earlier_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _resume_offline(tmp_path, [*_STOPPED, *_KILLED], monkeypatch).summary == {"best/top1": 50.0}


def test_a_long_import_of_wandb_is_not_counted_against_its_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine it was said not to have started, and that it was out of reach went unsaid in its place."""
    stage = SimpleNamespace(now=0.0, asked=threading.Event(), answered=threading.Event(), run=_WandbRun())
    monkeypatch.setattr(wandb_sink, "time", SimpleNamespace(monotonic=lambda: stage.now))
    monkeypatch.setitem(sys.modules, "stage", stage)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb.py").write_text(
        "import stage\nstage.now += 60\nSettings = dict\n"
        "def init(**settings):\n    stage.asked.set()\n    stage.answered.wait()\n    return stage.run\n"
    )
    said: list[str] = []
    try:
        sink = WandbSink(LoggerConfig(wandb="online"), tmp_path, "run", {}, [], warn=said.append)
        assert stage.asked.wait(60)
        sink.log("train", _train(1)[0])
        assert said == []
        stage.now += 60
        sink.log("train", _train(2)[0])
        assert said == ["W&B has not started within 60 s; training does not wait for it"]
    finally:
        stage.answered.set()
        sink.close()
        sys.modules.pop("wandb", None)
    assert [values["step"] for values in stage.run.logged] == [1, 2]


def test_meters_mean_over_steps() -> None:
    meters = StepMeters(torch.device("cpu"))
    for losses in ((1.0, 2.0), (3.0, 4.0)):
        meters.begin_step()
        for loss in losses:
            meters.add_loss(torch.tensor(loss) / 2)
        meters.add_step(torch.tensor(10.0), images=8)
    assert meters.step_loss == 3.5
    result = meters.flush()
    assert result["train/loss"] == 2.5
    assert result["train/grad_norm"] == 10.0
    assert result["speed/slowest_rank_ratio"] == 1.0
    assert len(meters.by_rank["own_seconds"]) == 1
    assert meters.steps == 0


@pytest.mark.parametrize(("last", "every"), [(60, 15), (60, 30), (50, 15), (10, 15), (60, 45)])
def test_the_remaining_time_counts_every_evaluation_that_is_still_to_come(last: int, every: int) -> None:
    evaluated = {step for step in range(1, last + 1) if step % every == 0 or step == last}
    for step in range(1, last + 1):
        assert evaluations_ahead(step, last, every) == len([e for e in evaluated if e >= step]), step
