"""Processes that die: in a step, in a save, in an evaluation; and runs that die again and again."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from scripts.inspect_run import inspect
from tests.faults.harness import LASTING, STEPS, WRITES_WAITED_FOR, Trainer, newest, state_hash, valid_steps

pytestmark = pytest.mark.faults
DRAWS = random.Random(5)


@pytest.mark.parametrize(
    ("step", "rank"), [(1, 0)] + [(DRAWS.randrange(2, STEPS), DRAWS.randrange(2)) for _ in range(4)]
)
def test_a_killed_rank_ends_the_job_and_the_same_command_continues_to_the_same_weights(
    train: Trainer, reference: str, step: int, rank: int
) -> None:
    killed = train.start("run", WRITES_WAITED_FOR, fault=f"kill@{step}:{rank}")
    assert killed.wait() == 1
    end = time.time()
    assert end - max(b["time"] for b in killed.heartbeats if b["rank"] == rank) < 10
    if rank == 1:
        assert killed.status["status"] == "failed"
        assert f"is gone since step {step}" in killed.status["cause"] or f"step {step - 1}" in killed.status["cause"]
    saved = valid_steps(killed.directory)
    assert step - (max(saved) if saved else 0) <= 5, "more than one checkpoint interval is lost"
    assert train.run("run").code == 0
    assert state_hash(killed.directory) == reference


def test_a_lost_node_leaves_no_lock_and_loses_at_most_one_interval(train: Trainer, reference: str) -> None:
    lost = train.start("run", WRITES_WAITED_FOR, fault=LASTING)
    lost.wait_for_step(12)
    lost.kill()
    lost.wait()
    lost.wait_for_ranks()
    assert (lost.directory / "LOCK").exists()
    assert max(valid_steps(lost.directory)) >= 8
    again = train.run("run")
    assert again.code == 0
    assert "taken over" in again.output
    assert state_hash(again.directory) == reference
    report = inspect(again.directory)
    assert [start["ending"] for start in report["starts"]] == ["killed", "finished"]
    assert 0 <= report["lost_steps"] <= 5, "at most the checkpoint interval"
    assert all(item["valid"] for item in report["checkpoints"])
    assert 0.0 < report["goodput"] < 1.0


@pytest.mark.parametrize("place", ["copy", "open", "payload", "fsync", "rename", "retain", "saved"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(train: Trainer, place: str) -> None:
    killed = train.run("run", WRITES_WAITED_FOR, fault=f"kill@15/{place}", ranks=1)
    assert killed.code != 0
    expected = 15 if place in ("retain", "saved") else 10
    assert max(valid_steps(killed.directory)) == expected
    again = train.run("run", "trainer.max_steps=16", ranks=1)
    assert again.code == 0
    assert again.events("start")[-1]["resumed_from"] == f"step_{expected:08d}.pt"
    assert not list((again.directory / "checkpoints").glob("*.tmp"))


def test_a_run_killed_in_its_last_evaluation_makes_up_for_it(train: Trainer, reference: str) -> None:
    killed = train.run("run", fault=f"kill@{STEPS}:0/evaluate")
    assert killed.code == 1
    assert [e["step"] for e in killed.events("eval")] == [8, 16]
    again = train.run("run")
    assert again.code == 0
    assert [e["step"] for e in again.events("eval")] == [8, 16, STEPS]
    assert state_hash(again.directory) == reference


def test_a_failure_beside_a_write_lets_it_end(train: Trainer) -> None:
    """The checkpoint was lost, and the exit code SIGABRT's: the interpreter's end met the writing thread in torch."""
    buffers_are_made = "sleep0.5@4"  # with these under way no write would begin at step 5
    failed = train.run("run", fault=f"{buffers_are_made},sleep1@5/fsync,raise@6", ranks=1)
    assert failed.code == 1 and "ordered fault at step 6" in failed.status["cause"]
    assert valid_steps(failed.directory) == [5]
    assert [e["event"] for e in failed.events()][-2:] == ["checkpoint", "stop"]


def test_a_last_evaluation_in_mid_epoch_is_made_up_for_as_well(train: Trainer) -> None:
    killed = train.start("run", "trainer.max_steps=12", fault="sleep600@12/evaluate", ranks=1)
    killed.wait_for(lambda: 12 in valid_steps(killed.directory))
    killed.kill()
    killed.wait_for_ranks()
    again = train.run("run", "trainer.max_steps=12", ranks=1)
    assert (again.code, [e["step"] for e in again.events("eval")]) == (0, [8, 12])
    assert again.status["eval/top1"] == again.events("eval")[-1]["eval/top1"]


def test_a_kill_in_a_long_evaluation_loses_no_step(train: Trainer, reference: str) -> None:
    killed = train.start("run", "checkpoint.every_steps=null", fault="sleep600@8/evaluate", ranks=1)
    killed.wait_for(lambda: valid_steps(killed.directory) == [8])
    killed.kill()
    killed.wait_for_ranks()
    again = train.run("run")
    assert again.events("start")[-1]["step"] == 8
    assert [e["step"] for e in again.events("eval")] == [8, 16, STEPS]


@pytest.mark.parametrize("fault", ["raise", "exit"])
def test_one_rank_that_gives_up_takes_the_job_down_and_is_named(train: Trainer, fault: str) -> None:
    failed = train.start("run", fault=f"{fault}@7:1")
    failed.wait()
    assert failed.code == 1
    assert time.time() - max(b["time"] for b in failed.heartbeats if b["rank"] == 1) < 10
    assert failed.status["status"] == "failed"
    assert failed.status["cause"].startswith("rank 1 on ")
    assert ("ordered fault at step 7" if fault == "raise" else "is gone since step") in failed.status["cause"]


def test_first_evaluation_after_a_resume_scores_the_same_ema(train: Trainer, uninterrupted, reference: str) -> None:
    train.run("run", fault="kill@14")
    again = train.run("run")
    undisturbed = {e["step"]: e for e in uninterrupted.events("eval")}
    score = next(e for e in again.events("eval") if e["step"] == 16)
    assert score["eval/ema_loss"] == undisturbed[16]["eval/ema_loss"]
    assert score["eval/loss"] == undisturbed[16]["eval/loss"]


def test_a_crash_loop_ends_after_three_starts_and_says_at_which_step(train: Trainer) -> None:
    for _ in range(4):  # the first one gets from 0 to the checkpoint of step 5
        assert train.run("run", fault="kill@7", ranks=1).code != 0
    stopped = train.run("run", ranks=1)
    assert stopped.code == 2
    assert stopped.status["status"] == "failed"
    assert "no progress over several starts: the last 3 all began at step 5" in stopped.status["cause"]
    assert "ended by a fault at step 7" in stopped.status["cause"] or "at step 6" in stopped.status["cause"]
    mended = train.run("run", ranks=1)  # whoever repeats the command by hand gets a fresh budget
    assert mended.code == 0


def test_torchrun_survives_the_same_kill(train: Trainer, reference: str) -> None:
    killed = train.start("run", fault="kill@11:1", torchrun=True)
    assert killed.wait() == 1
    again = train.start("run", fault=LASTING, torchrun=True)
    again.wait_for(lambda: len(again.heartbeats) == 2 and again.heartbeats[0]["step"] >= 14)
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    again.wait_for_ranks()  # they save and end; until then the next start would be refused
    assert train.run("run").code == 0
    assert state_hash(again.directory) == reference
    assert newest(again.directory).name == f"step_{STEPS:08d}.pt"
