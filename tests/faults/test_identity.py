"""What a run is: its directory, its settings, its data, its size; and who may continue it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid

import pytest
import torch

from mambavision.engine import checkpoint
from tests.faults.harness import ROOT, STEPS, STEPS_PER_EPOCH, Trainer, newest, state_hash

pytestmark = pytest.mark.faults


def stop_at(train: Trainer, step: int, *overrides: str, ranks: int = 1) -> None:
    """Leaves a run that was preempted at `step` (even)."""
    assert train.run("run", *overrides, fault=f"term@{step - 1}", ranks=ranks).status["step"] == step


def test_two_ranks_then_one_then_two_see_the_same_samples_and_agree(train: Trainer, uninterrupted) -> None:
    stop_at(train, 6, ranks=2)
    stop_at(train, 14, ranks=1)
    again = train.run("run", ranks=2)
    assert again.code == 0
    assert [e["world_size"] for e in again.events("start")] == [2, 1, 2]
    assert any("1 ranks where there were 2" in e["message"] for e in again.events("notice"))
    changed, same = (checkpoint.load(newest(t.directory)) for t in (again, uninterrupted))
    assert changed["progress"] == same["progress"]
    losses = [{e["step"]: e["train/loss"] for e in t.events("train")} for t in (again, uninterrupted)]
    assert losses[0].keys() == losses[1].keys()
    assert all(abs(losses[0][step] - losses[1][step]) < 1e-3 for step in losses[0])
    assert abs(losses[0][8] - losses[1][8]) < 1e-5


def test_another_global_batch_is_refused_and_if_allowed_continues_at_the_same_sample(train: Trainer) -> None:
    stop_at(train, 12)
    refused = train.run("run", "trainer.global_batch_size=8", ranks=1)
    assert refused.code == 2
    assert "trainer.global_batch_size: 16 -> 8" in refused.output
    assert "resume.allow=[trainer.global_batch_size]" in refused.output
    allowed = train.run("run", "trainer.global_batch_size=8", "resume.allow=[trainer.global_batch_size]", ranks=1)
    assert allowed.code == 0
    # One epoch of 8 steps and 4 x 16 samples of the second: with 8 a step that is 16 steps an epoch, and 8 of the
    # second.
    assert allowed.events("start")[-1]["step"] == 24
    assert allowed.status["step"] == 48
    assert checkpoint.load(newest(allowed.directory))["progress"]["samples_seen"] == 12 * 16 + 24 * 8


def test_a_larger_global_batch_continues_and_is_continued_though_its_steps_have_lower_numbers(train: Trainer) -> None:
    larger = ("trainer.global_batch_size=32", "resume.allow=[trainer.global_batch_size]")
    stop_at(train, 12)  # of 8 steps an epoch; 4 with the larger batch: step 6
    stopped = train.run("run", *larger, "trainer.max_steps=8", ranks=1)
    assert stopped.events("start")[-1]["step"] == 6
    again = train.run("run", *larger, ranks=1)
    assert again.events("start")[-1]["step"] == 8
    assert again.events("start")[-1]["resumed_from"] == "step_00000008.pt"
    assert newest(again.directory) == again.directory / "checkpoints" / f"step_{again.status['step']:08d}.pt"
    assert checkpoint.load(newest(again.directory))["progress"]["step"] == again.status["step"] == 12


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("optimizer.lr=0.001", "optimizer.lr: 0.005 -> 0.001"),
        ("seed=1", "seed: 0 -> 1"),
        ("data.synthetic_train_samples=200", "data.synthetic_train_samples: 130 -> 200"),
        ("model.architecture.dim=32", "model.architecture.dim: 16 -> 32"),
    ],
)
def test_a_resume_with_another_recipe_is_refused_with_the_difference(
    train: Trainer, override: str, difference: str
) -> None:
    stop_at(train, 4)
    before = (train.output_dir / "run/config.yaml").read_text()
    refused = train.run("run", override, ranks=1)
    assert refused.code == 2
    assert difference in refused.output
    assert (train.output_dir / "run/config.yaml").read_text() == before
    assert refused.status["status"] == "failed", "a stale `preempted` would have it requeued for ever"
    assert refused.status["refused"] is True


def test_a_run_that_is_to_go_on_under_changed_settings_needs_its_name(train: Trainer) -> None:
    first = train.run("run", "run_name=''", "trainer.max_steps=2", ranks=1)
    (directory,) = [p for p in train.output_dir.iterdir() if p.is_dir()]
    changed = ("run_name=''", "optimizer.lr=0.001", "resume.allow=[optimizer.lr]", "trainer.max_steps=4")
    refused = train.run("run", *changed, ranks=1)
    assert (first.code, refused.code) == (0, 2)
    assert f"run_name={directory.name}" in refused.output
    assert train.run(directory.name, *changed[1:], ranks=1).events("start")[-1]["step"] == 2


def test_an_allowed_change_is_made_and_recorded_and_a_harmless_one_needs_no_word(train: Trainer) -> None:
    stop_at(train, 4)
    changes = ("optimizer.lr=0.001", "resume.allow=[optimizer.lr]", "trainer.log_every_steps=4", "data.num_workers=1")
    again = train.run("run", *changes, "trainer.max_steps=8", ranks=1)
    assert again.code == 0
    assert any("optimizer.lr: 0.005 -> 0.001" in e["message"] for e in again.events("notice"))
    config = (again.directory / "config.yaml").read_text()
    assert "log_every_steps: 4" in config and "lr: 0.001" in config
    assert train.run("run", *changes[:1], "trainer.max_steps=10", ranks=1).code == 0, "it is the run's setting now"


def test_a_mistyped_setting_is_refused_with_the_right_one(train: Trainer) -> None:
    refused = train.run("run", "+optimizer.lrr=1", ranks=2)
    assert refused.code == 1
    assert "did you mean optimizer.lr" in refused.output
    assert not refused.directory.exists()


def test_other_data_than_the_run_was_started_on_is_refused(train: Trainer) -> None:
    stop_at(train, 4)
    record = train.output_dir / "run/data.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "0123"}))
    refused = train.run("run", ranks=1)
    assert refused.code == 2
    assert "this run was started on other data" in refused.output
    assert "fingerprint: 0123 -> None" in refused.output


def test_a_second_launch_into_a_running_directory_is_refused_within_seconds(train: Trainer) -> None:
    first = train.start("run", "trainer.epochs=500", ranks=1)
    first.wait_for_step(2)
    start = time.monotonic()
    second = train.run("run", "trainer.epochs=500", ranks=2)
    assert second.code == 1
    assert time.monotonic() - start < 15
    assert f"in use by another training: pid {first.rank_pid(0)} on {socket.gethostname()}" in second.output
    assert first.poll(0) is None, "the first one goes on"
    assert json.loads((first.directory / "LOCK").read_text())["pid"] == first.rank_pid(0)


def lock_of_another_host(directory, *, token: str = "") -> None:
    directory.mkdir(exist_ok=True)
    record = {"host": "elsewhere", "pid": 1, "boot": "b", "pid_namespace": "p", "started": 1, "since": time.time()}
    (directory / "LOCK").write_text(json.dumps(record | {"token": token or uuid.uuid4().hex}))


def test_the_lock_of_a_lost_host_is_taken_over_once_its_heartbeats_stop(train: Trainer) -> None:
    lock_of_another_host(train.output_dir / "run")
    training = train.run("run", "trainer.max_steps=2", ranks=1)
    assert training.code == 0
    assert "pid 1 on elsewhere" in training.output


def test_the_lock_of_a_living_host_holds(train: Trainer) -> None:
    directory = train.output_dir / "run"
    lock_of_another_host(directory)
    training = train.start("run", "trainer.max_steps=2", ranks=1)
    while training.poll(0.3) is None:
        os.utime(directory / "LOCK")
    assert training.poll(0) == 2
    assert "in use by another training: pid 1 on elsewhere" in training.output


def test_a_run_whose_directory_was_taken_over_stops_and_writes_no_more(train: Trainer) -> None:
    training = train.start("run", "trainer.epochs=500", ranks=1)
    training.wait_for_step(6)
    lock_of_another_host(training.directory)
    assert training.wait(40) != 0
    assert "taken over by pid 1 on elsewhere" in training.output
    assert training.status["status"] == "running", "the status belongs to the new owner"
    assert json.loads((training.directory / "LOCK").read_text())["host"] == "elsewhere"


def test_ranks_that_start_seconds_apart_share_one_directory(train: Trainer) -> None:
    training = train.run("run", "trainer.max_steps=2", "run_name=''", START_SKEW_SECONDS="2")
    assert training.code == 0
    assert len([p for p in train.output_dir.iterdir() if p.is_dir()]) == 1


def test_of_a_sweep_of_three_the_second_fails_and_the_others_finish(train: Trainer) -> None:
    """Through the submitter's local mode: one process a point, so that a point cannot take the others along."""
    command = [
        sys.executable,
        "scripts/submit.py",
        "--local",
        "--nproc-per-node=1",
        "-m",
        "experiment=tiny",
        "logger=jsonl",
    ]
    command += [f"output_dir={train.output_dir}", "run_name=sweep", "trainer.max_steps=2", "seed=0,1,2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    broken = train.output_dir / "sweep" / "seed=1"
    broken.mkdir(parents=True)
    (broken / "checkpoints").write_text("a file where a directory is needed")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    statuses = [
        json.loads((train.output_dir / "sweep" / f"seed={s}" / "status.json").read_text())["status"] for s in (0, 2)
    ]
    assert statuses == ["finished", "finished"], output


def test_resume_is_exact_at_every_kind_of_step(train: Trainer, reference: str) -> None:
    """Mid-epoch, just before and after an epoch's end, again and again in one run; two ranks."""
    for step in (1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 13, STEPS - 1):
        train.run("run", "trainer.agree_every_steps=1", fault=f"usr@{step}:0")
    again = train.run("run")
    assert again.code == 0
    assert state_hash(again.directory) == reference


def test_one_rank_resumes_exactly_too(train: Trainer) -> None:
    undisturbed = train.run("undisturbed", ranks=1)
    for step in (3, 9, 16):
        train.run("run", fault=f"kill@{step}", ranks=1)
    again = train.run("run", ranks=1)
    assert again.code == 0
    assert state_hash(again.directory) == state_hash(undisturbed.directory)
    assert torch.is_tensor(checkpoint.load(newest(again.directory))["guard"]["refused_in_a_row"])
