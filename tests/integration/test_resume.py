"""The heart of the reliability promises, in half a minute; tests/faults has the rest."""

from __future__ import annotations

import os

import pytest

from mambavision.engine import checkpoint
from tests.faults.conftest import prefork, reference, train, uninterrupted  # noqa: F401
from tests.faults.harness import (
    LASTING,
    STEPS,
    STEPS_PER_EPOCH,
    WRITES_WAITED_FOR,
    Trainer,
    Training,
    newest,
    state_hash,
    valid_steps,
)


def test_a_run_killed_twice_and_stopped_once_arrives_at_the_same_bits(train: Trainer, reference: str) -> None:  # noqa: F811
    """A rank is killed in mid-epoch, a checkpoint's writer in its write, and one rank gets a signal."""
    killed = train.run("run", fault="kill@7:1")
    assert killed.code == 1
    assert killed.status["status"] == "failed"
    assert "rank 1" in killed.status["cause"]
    train.run("run", WRITES_WAITED_FOR, fault="kill@10:0/fsync")
    assert valid_steps(killed.directory) == [5, 8]
    noticed = train.run("run", fault="usr@17:1")
    assert (noticed.status["status"], noticed.status["step"]) == ("preempted", 18)
    finished = train.run("run")
    assert finished.code == 0
    assert finished.status["step"] == STEPS
    assert state_hash(finished.directory) == reference


def test_a_lost_node_and_a_damaged_checkpoint_cost_time_and_nothing_else(train: Trainer, reference: str) -> None:  # noqa: F811
    lost = train.start("run", fault=LASTING)
    lost.wait_for_step(12)
    lost.kill()
    lost.wait()
    lost.wait_for_ranks()
    path = newest(lost.directory)
    os.truncate(path, path.stat().st_size - 1)
    again = train.run("run")
    assert again.code == 0
    assert any(f"{path.name} is passed over" in e["message"] for e in again.events("warning"))
    assert state_hash(again.directory) == reference


def test_a_step_that_is_not_finite_is_refused_by_all_ranks(train: Trainer) -> None:  # noqa: F811
    training = train.run("run", "trainer.max_steps=8", fault="nan@5:1")
    assert training.code == 0
    assert [e["steps"] for e in training.events("refused")] == [[5]]
    assert checkpoint.load(newest(training.directory))["optimizer"]["param_groups"][0]["step"] == 7


@pytest.mark.parametrize("override", ["optimizer.lr=0.001", "+optimizer.lrr=1"])
def test_a_run_is_not_continued_as_another_one(train: Trainer, override: str) -> None:  # noqa: F811
    assert train.run("run", fault="term@1", ranks=1).code == 75
    refused = train.run("run", override, ranks=1)
    assert refused.code == 2
    assert "optimizer.lr" in refused.output


def test_epochs_are_numbered_alike_in_all_events_and_their_evaluations_are_expected(uninterrupted: Training) -> None:  # noqa: F811
    trained, scored = uninterrupted.events("train"), uninterrupted.events("eval")
    assert [e["epoch"] for e in trained] == [(e["step"] - 1) // STEPS_PER_EPOCH for e in trained]
    assert [(e["step"], e["epoch"]) for e in scored] == [(8, 0), (16, 1), (24, 2)]
    assert trained[-1]["step"] == STEPS and trained[-1]["eta_seconds"] > 0, "the last evaluation is still to come"
