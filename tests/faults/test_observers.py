"""W&B that raises, blocks and comes back: training does not notice, metrics.jsonl has everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.harness import ROOT, STEPS, Trainer, Training, state_hash
from tests.wandb_server import WandbServer

pytestmark = pytest.mark.faults
LOGGED = list(range(2, STEPS + 1, 2))


def run(train: Trainer, mode: str, fault: str = "") -> tuple[Training, list[dict]]:
    calls = train.output_dir / "calls.jsonl"
    environment = {
        "FAKE_WANDB": str(ROOT / "tests/faults/fake_wandb"),
        "FAKE_WANDB_MODE": mode,
        "FAKE_WANDB_CALLS": str(calls),
    }
    training = train.run(
        "run", "logger.wandb=online", "logger.init_timeout_seconds=1", fault=fault, ranks=2, **environment
    )
    return training, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["init_raises", "init_blocks", "log_raises", "log_blocks"])
def test_a_wandb_that_fails_or_blocks_costs_one_warning(train: Trainer, reference: str, mode: str) -> None:
    training, calls = run(train, mode)
    assert training.code == 0
    assert training.status["status"] == "finished"
    assert [e["step"] for e in training.events("train")] == LOGGED
    assert state_hash(training.directory) == reference
    assert sum("W&B" in e["message"] for e in training.events("warning")) in (1, 2), "at most one more at the very end"
    started = training.events("start")[0]["time"]
    assert training.events("train")[0]["time"] - started < 10, "training waited for W&B"
    if mode == "init_raises":
        assert [(c["call"], c.get("mode")) for c in calls[:3]] == [
            ("init", "online"),
            ("teardown", None),
            ("init", "offline"),
        ]
        assert [c["step"] for c in calls if c["call"] == "log" and c["loss"] is not None] == LOGGED


def test_a_resumed_run_is_the_same_wandb_run_and_its_steps_never_go_backwards(train: Trainer) -> None:
    run(train, "", fault="kill@13")
    training, calls = run(train, "")
    assert training.code == 0
    starts = [c for c in calls if c["call"] == "init"]
    assert len(starts) == 2
    assert starts[0]["id"] == starts[1]["id"] == (training.directory / "wandb_run_id").read_text()
    assert {c["resume"] for c in starts} == {"allow"}
    steps = [c["step"] for c in calls if c["call"] == "log" and c["loss"] is not None]
    assert steps == LOGGED, "each step once, in order, across the kill"
    evaluations = [c["step"] for c in calls if c["call"] == "log" and c["loss"] is None]
    assert evaluations == [8, 16, 24]


def test_the_real_wandb_runs_offline_without_a_key(train: Trainer, reference: str) -> None:
    training = train.run("run", "logger.wandb=auto", ranks=2, WANDB_API_KEY="", HOME=str(train.output_dir), timeout=120)
    assert training.code == 0
    files = list((training.directory / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert Path(files[0]).stat().st_size > 1000
    assert state_hash(training.directory) == reference


def test_the_real_wandb_continues_the_same_run_online_with_each_step_once(train: Trainer) -> None:
    with WandbServer() as server:
        environment = {**server.environment, "HOME": str(train.output_dir)}
        train.run("run", "logger.wandb=online", fault="term@13", ranks=1, timeout=150, **environment)
        again = train.run("run", "logger.wandb=online", ranks=1, timeout=150, **environment)
        assert again.code == 0, again.output
        ((name, run),) = server.runs.items()
    assert name == (again.directory / "wandb_run_id").read_text()
    assert [line["step"] for line in run.history if "train/loss" in line] == LOGGED
    assert [line["step"] for line in run.history if "eval/top1" in line] == [8, 16, 24]
