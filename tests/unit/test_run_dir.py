"""The run directory: its lock, its history, the data it was started on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mambavision.compose import compose_train_config
from mambavision.config import ModelConfig, TrainConfig
from mambavision.run_dir import RunDirectory, check_resume, plain, run_name, write_atomically
from mambavision.run_history import NO_PROGRESS, starts, starts_without_progress
from mambavision.run_lock import LockLost, RunLock
from scripts.inspect_run import inspect


def test_a_lock_is_held_by_one_and_released(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path, 0.2), RunLock(tmp_path, 0.2)
    assert first.acquire() is None
    with pytest.raises(ValueError, match=f"pid {os.getpid()} on {socket.gethostname()}"):
        second.acquire()
    first.release()
    assert second.acquire() is None


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, pathlib; lock = runpy.run_path(sys.argv[1])['RunLock'](pathlib.Path(sys.argv[2]), 10); "
        "lock.acquire()"
    )
    module = Path(__file__).parents[2] / "mambavision/run_lock.py"  # alone: importing the package takes seconds
    subprocess.run([sys.executable, "-c", code, str(module), str(tmp_path)], check=True)
    start = time.monotonic()
    assert "pid" in RunLock(tmp_path, 100).acquire()
    assert time.monotonic() - start < 30, "not the three heartbeats that an owner on another host would be given"


def test_a_number_used_again_by_another_process_does_not_keep_a_dead_lock_alive(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 0.1)
    lock.acquire()
    record = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(record | {"started": record["started"] - 1, "token": "earlier"}))
    assert RunLock(tmp_path, 0.1).acquire() is not None


def test_of_many_who_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 10)
    lock.acquire()
    record = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(record | {"started": -1, "token": "dead"}))
    outcomes: list[object] = []

    def contend() -> None:
        try:
            # Who takes over is believed dead after three heartbeats: longer than a thread may have to wait for a core.
            outcomes.append(RunLock(tmp_path, 10).acquire())
        except ValueError as refused:
            outcomes.append(refused)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([o for o in outcomes if not isinstance(o, ValueError)]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["LOCK"]


def test_one_who_died_while_taking_over_holds_up_the_next_only_for_a_while(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 0.1)
    lock.acquire()
    record = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps(record | {"started": -1, "token": "dead"}))
    (tmp_path / "LOCK.dead.claim").touch()
    assert RunLock(tmp_path, 0.1).acquire() is not None
    assert [file.name for file in tmp_path.iterdir()] == ["LOCK"]


@pytest.mark.slow
def test_the_lock_of_a_start_that_takes_long_stays_fresh_on_another_host(tmp_path: Path) -> None:
    owner = RunLock(tmp_path, 0.1)
    owner.acquire()
    record = json.loads(owner.path.read_text())
    owner.path.write_text(json.dumps(record | {"host": "elsewhere"}))
    said: list[str] = []
    with owner.heartbeat(said.append):
        with pytest.raises(ValueError, match="in use by another training"):
            RunLock(tmp_path, 10).acquire()  # patient: the owner's thread may have to wait for a core
        assert not said
        owner.path.write_text(json.dumps(record | {"token": "other", "host": "elsewhere", "pid": 9}))
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "taken over by pid 9 on elsewhere" in said[0]
    assert RunLock(tmp_path, 0.1).acquire() == "pid 9 on elsewhere", "nothing keeps it fresh any more"


def test_an_owner_whose_lock_was_taken_learns_it_at_its_next_heartbeat(tmp_path: Path) -> None:
    owner = RunLock(tmp_path, 0.1)
    owner.acquire()
    owner.refresh()
    record = json.loads(owner.path.read_text())
    owner.path.write_text(json.dumps(record | {"token": "other", "host": "elsewhere", "pid": 9}))
    for _ in range(2):  # whoever asks, the checkpoint's writer or the watchdog, and however often
        with pytest.raises(LockLost, match="taken over by pid 9 on elsewhere"):
            owner.refresh()
    owner.release()
    assert owner.path.exists(), "it is not ours to remove"


BASE = ("model=mambavision_t", "data.path=/data/imagenet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "trainer=gpu1",
        "trainer=cpu",
        "trainer.precision=fp32",
        "trainer.max_steps=5",
        "guard.max_rollbacks=2",
        "data.max_corrupt_fraction=0.5",
        "data.path=/scratch/imagenet",
        "checkpoint.keep_last=5",
    ],
)
def test_what_may_change_on_resume_finds_the_same_run(change: str) -> None:
    assert run_name(compose_train_config([*BASE, change])) == run_name(compose_train_config([*BASE]))


@pytest.mark.parametrize("change", ["optimizer.lr=0.004", "seed=1", "augment=light", "model.checkpoint={file}"])
def test_what_makes_another_run_gives_another_name(change: str, tmp_path: Path) -> None:
    (tmp_path / "start.pt").touch()
    changed = compose_train_config([*BASE, change.format(file=tmp_path / "start.pt")])
    assert run_name(changed) != run_name(compose_train_config([*BASE]))


def test_other_data_is_refused_unless_allowed(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.check_data({"samples": 100, "fingerprint": "a"}, ())
    with pytest.raises(ValueError, match="samples: 100 -> 99"):
        run_dir.check_data({"samples": 99, "fingerprint": "a"}, ())
    run_dir.check_data({"samples": 99, "fingerprint": "b"}, ("data.fingerprint",))
    run_dir.check_data({"samples": 99, "fingerprint": "b"}, ())


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def history(directory: Path, *events: dict) -> None:
    lines = [json.dumps({"time": 1000.0 + 10 * i, **e}) for i, e in enumerate(events)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def started(step: int) -> dict:
    return {"event": "start", "step": step, "world_size": 2}


def failed(step: int, cause: str = "RuntimeError: x") -> dict:
    return {"event": "stop", "step": step, "status": "failed", "cause": cause}


def test_history_tells_lost_steps_and_endings(tmp_path: Path) -> None:
    train, saved = {"event": "train", "step": 30}, {"event": "checkpoint", "step": 20}
    history(
        tmp_path,
        started(0),
        saved,
        train,
        started(20),
        {"event": "stop", "step": 44, "status": "preempted"},
        started(44),
    )
    first, second, third = starts(tmp_path)
    assert (first.ending, first.last_step, first.saved_step, first.lost_steps) == ("killed", 30, 20, 10)
    assert first.useful_seconds == pytest.approx(20 * 20 / 30)
    assert (second.ending, second.lost_steps, third.ending) == ("preempted", 0, "killed")


def test_useful_time_is_that_of_steps_which_counted(tmp_path: Path) -> None:
    """Not of starting (100 s here), of an evaluation (500 s) and of the ten steps that were done again."""
    train = {"event": "train", "speed/step_seconds": 2.0}
    history(
        tmp_path,
        {"event": "launch", "time": 1000.0},
        started(0) | {"time": 1100.0},
        {**train, "step": 20, "time": 1140.0},
        {"event": "eval", "step": 20, "time": 1640.0},
        {**train, "step": 40, "time": 1680.0},
        started(30) | {"time": 9000.0},
    )
    first, _ = starts(tmp_path)
    assert (first.last_time - first.time, first.useful_seconds) == (680.0, 60.0)


def test_a_larger_batch_with_fewer_steps_has_lost_none(tmp_path: Path) -> None:
    larger = started(6) | {"resumed_from": "step_00000012.pt"}
    history(tmp_path, started(0), {"event": "train", "step": 13}, larger)
    assert [s.lost_steps for s in starts(tmp_path)] == [1, 0]


def test_only_faults_at_the_same_step_count_against_the_restart_budget(tmp_path: Path) -> None:
    preempted = {"event": "stop", "step": 20, "status": "preempted"}
    history(tmp_path, started(0), started(20), failed(25), started(20), preempted, started(20))
    assert len(starts_without_progress(tmp_path, 20)) == 2
    assert len(starts_without_progress(tmp_path, 0)) == 0
    history(tmp_path, started(20), failed(25), started(20), {"event": "checkpoint", "step": 30}, failed(31))
    assert starts_without_progress(tmp_path, 20) == []


def refused(cause: str) -> dict:
    return {"event": "stop", "step": 20, "status": "failed", "cause": cause}


def test_what_a_launch_says_before_its_start_is_not_counted_with_the_start_before(tmp_path: Path) -> None:
    launch, notice = {"event": "launch", "time": 9000.0}, {"event": "notice", "time": 9001.0, "message": "2 ranks"}
    history(tmp_path, started(0), {"event": "train", "step": 30}, launch, notice, started(20) | {"time": 9002.0})
    first, second = starts(tmp_path)
    assert first.last_time - first.time == 10.0, "the hours between the two are nobody's"
    assert [e["event"] for e in second.events] == ["launch", "notice", "start"]


def test_a_launch_that_was_refused_changes_nothing_about_the_start_before(tmp_path: Path) -> None:
    launch = {"event": "launch", "time": 9000.0}
    (tmp_path / "heartbeats").mkdir()
    beat = {"rank": 0, "host": "x", "pid": 1, "step": 0, "phase": "end", "time": 9001.0}
    (tmp_path / "heartbeats" / "rank_00000.json").write_text(json.dumps(beat))
    for cause in ("ValueError: the checkpoint is of another model", f"ValueError: {NO_PROGRESS}: the last 1 ..."):
        history(tmp_path, started(20), {"event": "train", "step": 30}, launch, refused(cause))
        (only,) = starts(tmp_path)
        assert (only.ending, only.cause, only.last_time) == ("killed", None, 1010.0)
        assert len(starts_without_progress(tmp_path, 20)) == (0 if NO_PROGRESS in cause else 1)


def test_a_refusal_that_an_earlier_version_logged_without_a_launch_counts_as_one(tmp_path: Path) -> None:
    history(tmp_path, started(20), failed(25), refused(f"ValueError: {NO_PROGRESS}: the last 1 ..."))
    assert starts_without_progress(tmp_path, 20) == []


def test_the_best_that_is_shown_is_the_one_whose_checkpoint_is_kept(tmp_path: Path) -> None:
    scores = [(15, 0, 40.0, 60.0), (15, 0, 40.0, 30.0), (30, 1, 10.0, 35.0), (45, 2, 39.0, 34.0)]  # 15 is done again
    evaluations = [
        {"event": "eval", "step": step, "epoch": epoch, "eval/top1": raw, "eval/ema_top1": ema}
        for step, epoch, raw, ema in scores
    ]
    history(tmp_path, started(0), *evaluations)
    assert inspect(tmp_path)["best"] == {"step": 30, "epoch": 1, "weights": "EMA", "top1": 35.0}


def test_a_setting_that_came_later_is_no_change_of_an_older_run() -> None:
    stored = plain(asdict(TrainConfig()))
    del stored["model"]["checkpoint_weights"]
    assert check_resume(stored, TrainConfig()) == []
    (change,) = check_resume(stored, replace(TrainConfig(), model=ModelConfig(checkpoint_weights="ema")))
    assert change == "model.checkpoint_weights: 'model' -> 'ema'"


@pytest.mark.parametrize("content", ["", "model: [b", "7"])
def test_records_that_cannot_be_read_are_named(content: str, tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.config_file.write_text(content)
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match="config.yaml cannot be read"):
        run_dir.stored_config()
    with pytest.raises(ValueError, match="data.json cannot be read"):
        run_dir.check_data({"samples": 1}, ())
