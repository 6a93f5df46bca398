"""Notices: signals to the launcher, to one rank, to all; STOP files; launchers that die; a second notice."""

from __future__ import annotations

import os
import signal
import time

import pytest

from scripts.inspect_run import inspect
from tests.faults.harness import STEPS, Trainer, running, state_hash, valid_steps

pytestmark = pytest.mark.faults


def test_sigterm_to_the_launcher_saves_within_its_grace_and_resumes_exactly(train: Trainer, reference: str) -> None:
    training = train.start("run")
    training.wait_for_step(9)
    noticed = time.time()
    os.kill(training.pid, signal.SIGTERM)
    training.wait(30)
    assert time.time() - noticed < 30
    assert training.status["status"] == "preempted"
    assert training.status["cause"] == "SIGTERM"
    assert max(valid_steps(training.directory)) == training.status["step"], "steps were lost on a notice"
    assert training.status["step"] <= 9 + 2 + 4
    assert train.run("run").code == 0
    report = inspect(training.directory)
    assert [(start["ending"], start["lost_steps"]) for start in report["starts"]] == [("preempted", 0), ("finished", 0)]
    assert state_hash(training.directory) == reference


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(train: Trainer, reference: str) -> None:
    training = train.run("run", fault="usr@9:1")
    assert training.code == 1  # the launcher flattens the ranks' 75
    assert training.status["status"] == "preempted"
    assert training.status["step"] == 10
    assert {b["step"] for b in training.heartbeats} == {10}
    assert train.run("run").code == 0
    assert state_hash(training.directory) == reference


def test_usr1_to_a_launcher_that_does_not_forward_it_leaves_no_orphans(train: Trainer) -> None:
    training = train.start("run", "trainer.epochs=200")
    training.wait_for_step(3)
    ranks = [training.rank_pid(rank) for rank in (0, 1)]
    os.kill(training.pid, signal.SIGUSR1)
    assert training.wait(10) == -signal.SIGUSR1
    end = time.monotonic() + 40
    while any(running(pid) for pid in ranks):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
    assert training.status["status"] == "preempted"
    assert training.status["cause"] in ("the launcher has died", "notice on another rank")
    assert max(valid_steps(training.directory)) == training.status["step"]


def test_a_stop_file_stops_the_run_and_does_not_stop_the_next_one(train: Trainer, reference: str) -> None:
    training = train.start("run")
    training.wait_for_step(5)
    (training.directory / "STOP").touch()
    training.wait()
    assert training.status["status"] == "preempted"
    assert training.status["cause"] == "STOP file"
    assert train.run("run").code == 0
    assert not (training.directory / "STOP").exists()
    assert state_hash(training.directory) == reference


def test_a_second_signal_while_the_first_is_saving_changes_nothing(train: Trainer) -> None:
    training = train.run("run", fault="term@5,term@6/payload,term@6/rename", ranks=1)
    assert training.code == 75
    assert training.status["status"] == "preempted"
    assert valid_steps(training.directory)[-1] == training.status["step"] == 6
    assert not list((training.directory / "checkpoints").glob("*.tmp"))


def test_a_signal_in_the_first_step_is_a_clean_stop(train: Trainer, reference: str) -> None:
    training = train.run("run", fault="term@0:1")
    assert training.status["status"] == "preempted"
    assert training.status["step"] == 1, "the ranks meet after the first steps, whose length they do not know yet"
    assert train.run("run").code == 0
    assert state_hash(training.directory) == reference


def test_a_run_that_is_told_to_stop_in_its_last_step_has_finished(train: Trainer, reference: str) -> None:
    training = train.run("run", fault=f"term@{STEPS - 1}")
    assert training.code == 0
    assert training.status["status"] == "finished"
    assert state_hash(training.directory) == reference


def test_two_unrelated_runs_on_one_node_do_not_meet(train: Trainer) -> None:
    both = [train.start(name, "trainer.max_steps=4", torchrun=True) for name in ("one", "two")]
    assert [training.wait(200) for training in both] == [0, 0]
