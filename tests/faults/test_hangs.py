"""Ranks that hang, are slow, or wait for data; and data that cannot be read."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import STEPS, Trainer, running, state_hash

pytestmark = pytest.mark.faults


def test_a_frozen_rank_is_named_with_the_stacks_of_the_others_and_the_job_ends(train: Trainer) -> None:
    timeout = 8
    settings = (f"watchdog.step_timeout_seconds={timeout}", "watchdog.stall_seconds=3")
    training = train.start("run", *settings, fault="freeze@10:1")
    training.wait_for_step(10)
    frozen = training.rank_pid(1)
    start = time.monotonic()
    code = training.wait(timeout + 40)
    assert code == 1
    assert time.monotonic() - start < timeout + 40
    (stall,) = training.events("stall")
    assert stall["rank"] == 0
    assert any(f"rank 1 on {stall['host']} (pid {frozen}) has been silent" in other for other in stall["others"])
    stacks = (training.directory / "stacks/rank_00000.txt").read_text()
    assert "trainer.py" in stacks and "train_step" in stacks
    assert training.status["status"] == "failed"
    assert f"rank 1 on {stall['host']} (pid {frozen}) has been silent since step 10" in training.status["cause"]


def test_a_slow_rank_is_named_and_the_run_goes_on(train: Trainer, reference: str) -> None:
    training = train.run("run", fault="sleep0.4@10-15:1")
    assert training.code == 0
    slow = {e["step"]: e for e in training.events("ranks")}[14]
    assert slow["own_seconds"][1] > 2 * slow["own_seconds"][0]
    assert "slow      rank 1 on " in training.output
    measured = next(e for e in training.events("train") if e["step"] == 14)
    assert measured["speed/slowest_rank"] == 1
    assert state_hash(training.directory) == reference


def test_a_stalled_loader_is_reported_with_rank_and_host_and_the_run_goes_on(train: Trainer, reference: str) -> None:
    training = train.run("run", "data.stall_warning_seconds=1", fault="sleep3@11:1/data")
    assert training.code == 0
    assert f"rank 1 on {os.uname().nodename} has waited" in training.output
    assert state_hash(training.directory) == reference


def test_an_exception_in_the_loader_ends_all_ranks(train: Trainer) -> None:
    training = train.start("run", fault="raise@11:1/data")
    training.wait_for_step(11)
    start = time.monotonic()
    assert training.wait(30) == 1
    assert time.monotonic() - start < 30
    assert "ordered fault at step 11 (data)" in training.status["cause"]


@pytest.mark.parametrize("samples", [37, 38, 41])
def test_sizes_that_do_not_divide_neither_hang_nor_count_twice(train: Trainer, samples: int) -> None:
    sizes = (f"data.synthetic_train_samples={samples}", f"data.synthetic_eval_samples={samples}", "trainer.epochs=1")
    training = train.run("run", *sizes, "schedule.warmup_epochs=0")
    assert training.code == 0
    assert training.status["step"] == samples // 16
    assert training.events("eval")[-1]["eval/images"] == samples


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    return []


FOLDER = ("data=folder", "data.image_size=32", "data.num_classes=null", "data.num_workers=1")


def test_signals_to_data_workers_are_ignored_and_a_killed_worker_ends_the_run(train: Trainer, images: Path) -> None:
    training = train.start("run", *FOLDER, f"data.path={images}", "trainer.epochs=30", ranks=1)
    training.wait_for_step(3)
    rank = training.rank_pid(0)
    workers = [pid for pid in _children(rank) if running(pid)]
    assert workers
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    reached = training.heartbeats[0]["step"]
    training.wait_for_step(reached + 6)
    os.kill(workers[0], signal.SIGKILL)
    start = time.monotonic()
    assert training.wait(40) != 0
    assert time.monotonic() - start < 30
    assert training.status["status"] == "failed"
    assert "worker" in training.status["cause"]


def test_a_corrupt_image_is_replaced_alike_on_every_resume_and_named(train: Trainer, images: Path) -> None:
    broken = images / "train/class0/007.jpg"
    broken.write_bytes(broken.read_bytes()[:120])
    settings = (*FOLDER, f"data.path={images}", "data.max_corrupt_fraction=0.5")
    undisturbed = train.run("undisturbed", *settings)
    assert undisturbed.code == 0, undisturbed.output
    assert "007.jpg" in undisturbed.output
    train.run("run", *settings, fault="kill@11")
    again = train.run("run", *settings)
    assert again.code == 0
    assert again.status["step"] == STEPS
    assert state_hash(again.directory) == state_hash(undisturbed.directory)


@pytest.mark.parametrize(
    ("setting", "broken", "advice"),
    [
        ("data.corrupt_images=stop", (11,), "data.corrupt_images=skip"),
        ("data.max_corrupt_fraction=0.001", (11, 12, 13, 14), "scripts/check_data.py"),
    ],
)
def test_corrupt_images_beyond_the_budget_end_the_run_with_the_name(
    train: Trainer, images: Path, setting: str, broken: tuple[int, ...], advice: str
) -> None:
    names = [f"train/class1/{number:03d}.jpg" for number in broken]
    for name in names:
        (images / name).write_bytes(b"")
    training = train.run("run", *FOLDER, f"data.path={images}", setting, ranks=1)
    assert training.code == 2
    assert training.status["status"] == "failed"
    assert training.status["refused"], "starting again would end alike"
    assert any(name in training.status["cause"] for name in names)
    assert "the file is empty (0 bytes)" in training.status["cause"]
    assert advice in training.status["cause"]
    assert "Traceback" not in training.output
