"""Checkpoint files and what decides which are written and kept; the processes they outlive are in tests/faults."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from mambavision.config import CheckpointConfig
from mambavision.engine import checkpoint
from mambavision.engine.checkpoint import CheckpointError, checkpoint_path, newest_valid
from mambavision.engine.checkpointer import Checkpointer, HostCopy, first_not_finite


def state(value: float = 1.0) -> dict:
    return {
        "model": {"weight": torch.full((64, 8), value), "count": torch.tensor(3)},
        "ema": {"weight": torch.full((64, 8), value)},
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(64, 8)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "guard": {"refused_in_a_row": torch.tensor(0), "rollbacks": 0},
    }


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    def of(self, kind: str) -> list[dict]:
        return [fields for event, fields in self.events if event == kind]


@pytest.fixture
def log() -> Log:
    return Log()


def checkpointer(directory: Path, log: Log, **settings: object) -> Checkpointer:
    return Checkpointer(directory, CheckpointConfig(**{"every_minutes": None, **settings}), log)


def steps(directory: Path) -> list[int]:
    return [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(directory)]


def test_what_was_saved_is_loaded_and_later_changes_to_the_weights_do_not_reach_it(tmp_path: Path, log: Log) -> None:
    writer, saved = checkpointer(tmp_path, log), state()
    writer.save(saved, step=5, record={"score": 1.0})
    saved["model"]["weight"].fill_(7.0)
    writer.finish()
    path, refused = newest_valid(tmp_path)
    assert path == checkpoint_path(tmp_path, 5) and refused == []
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["weight"], torch.ones(64, 8))
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert checkpoint.read_sidecar(path)["score"] == 1.0


def test_every_single_flipped_bit_is_noticed(tmp_path: Path, log: Log) -> None:
    writer = checkpointer(tmp_path, log)
    writer.save(state(), step=1, record={}, wait=True)
    path = checkpoint_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), 97):
        content[position] ^= 1
        path.write_bytes(content)
        assert checkpoint.verify(path) is not None, position
        content[position] ^= 1
    path.write_bytes(content)
    assert checkpoint.verify(path) is None


def test_a_checkpoint_without_its_checksum_is_not_believed(tmp_path: Path, log: Log) -> None:
    writer = checkpointer(tmp_path, log)
    for step in (1, 2):
        writer.save(state(), step=step, record={}, wait=True)
    checkpoint.sidecar(checkpoint_path(tmp_path, 2)).unlink()
    path, refused = newest_valid(tmp_path)
    assert checkpoint.step_of(path) == 1
    assert "missing or unreadable" in refused[0].reason
    checkpoint.set_aside(refused)
    assert steps(tmp_path) == [1]


def test_retention_keeps_the_newest_the_best_and_the_epochs_asked_for(tmp_path: Path, log: Log) -> None:
    writer = checkpointer(tmp_path, log, keep_last=2, keep_every_epochs=3)
    scores = {2: 50.0, 4: 80.0, 6: 70.0}
    for step in range(1, 11):
        record = {"score": scores.get(step), "epoch_finished": step // 2 if step % 2 == 0 else None}
        writer.save(state(), step=step, record=record, wait=True)
    assert steps(tmp_path) == [4, 6, 9, 10]  # 4: best, 6: third epoch, 9 and 10: newest
    assert all(checkpoint.verify(p) is None for p in checkpoint.list_checkpoints(tmp_path))


def test_retention_never_deletes_the_last_valid_one_for_the_sake_of_damaged_newer_ones(
    tmp_path: Path, log: Log
) -> None:
    for step in (50, 60, 70):
        checkpoint_path(tmp_path, step).write_bytes(b"damaged")
    writer = checkpointer(tmp_path, log, keep_last=2, keep_best=False)
    writer.save(state(), step=40, record={}, wait=True)
    assert checkpoint.verify(checkpoint_path(tmp_path, 40)) is None


def test_retention_keeps_a_good_one_while_steps_are_refused(tmp_path: Path, log: Log) -> None:
    writer = checkpointer(tmp_path, log, keep_last=1, keep_best=False)
    for step, refused in ((1, 0), (2, 1), (3, 2)):
        current = state()
        current["guard"]["refused_in_a_row"].fill_(refused)
        writer.save(current, step=step, record={}, wait=True)
    assert steps(tmp_path) == [1, 3]


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path, log: Log) -> None:
    broken = state()
    broken["ema"]["weight"][3, 3] = torch.inf
    assert first_not_finite({"model": broken["model"], "ema": broken["ema"]}) == "ema.weight"
    writer = checkpointer(tmp_path, log)
    writer.save(broken, step=1, record={})
    writer.finish()
    assert steps(tmp_path) == []
    assert "ema.weight" in log.of("checkpoint_failed")[0]["cause"]


class FlakyDisk:
    """os.fsync fails with the given error so many times: EIO and ESTALE cannot be had from a real disk on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, times: int):
        self.real, self.number, self.left = os.fsync, number, times
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        self.real(descriptor)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS])
def test_a_failed_write_is_reported_leaves_nothing_and_is_tried_again(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    writer = checkpointer(tmp_path, log, every_steps=10)
    writer.save(state(), step=10, record={}, wait=True)
    FlakyDisk(monkeypatch, number, times=1)
    writer.save(state(), step=20, record={})
    writer.finish()
    (failure,) = log.of("checkpoint_failed")
    assert os.strerror(number) in failure["cause"] and "MiB free" in failure["cause"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010.pt", "step_00000010.pt.json"]
    assert not writer.due(21)
    writer.retry_time = time.monotonic()  # five seconds later
    assert writer.due(21)
    writer.save(state(), step=21, record={}, wait=True)
    assert steps(tmp_path) == [10, 21]
    assert not writer.due(23)


def test_a_checkpoint_that_is_waited_for_is_on_disk_or_an_error(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    writer = checkpointer(tmp_path, log)
    disk = FlakyDisk(monkeypatch, errno.ENOSPC, times=2)
    writer.save(state(), step=1, record={}, wait=True)
    assert steps(tmp_path) == [1]
    disk.left = 3
    with pytest.raises(CheckpointError, match=r"step 2 could not be written: .*No space left.*Free space"):
        writer.save(state(), step=2, record={}, wait=True)
    assert steps(tmp_path) == [1]


def test_too_many_failed_writes_end_the_run(tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = checkpointer(tmp_path, log, max_write_failures=3)
    FlakyDisk(monkeypatch, errno.EIO, times=100)
    for step in (1, 2):
        writer.save(state(), step=step, record={})
        writer.finish()
    writer.save(state(), step=3, record={})
    with pytest.raises(CheckpointError, match="3 checkpoints in a row"):
        writer.finish()


def test_writing_a_step_again_is_safe_at_every_instant(tmp_path: Path, log: Log) -> None:
    """After a rollback: between the two renames the sidecar is already the new one, the checkpoint still the old."""
    writer = checkpointer(tmp_path, log)
    writer.save(state(1.0), step=7, record={}, wait=True)
    path = checkpoint_path(tmp_path, 7)
    old = path.read_bytes()
    writer.save(state(2.0), step=7, record={}, wait=True)
    assert checkpoint.load(path)["model"]["weight"][0, 0] == 1.0, "without `again` it is there already"
    writer.save(state(2.0), step=7, record={}, wait=True, again=True)
    assert checkpoint.load(path)["model"]["weight"][0, 0] == 2.0
    assert checkpoint.verify(path) is None
    path.write_bytes(old)
    assert checkpoint.verify(path) is None


def test_host_copy_reuses_its_buffers(tmp_path: Path) -> None:
    copy, source = HostCopy(), state()
    copy.prepare(source)
    first, _ = copy.take(source)
    second, _ = copy.take(source)
    assert first["model"]["weight"].data_ptr() == second["model"]["weight"].data_ptr()
    assert first["model"]["weight"].data_ptr() != source["model"]["weight"].data_ptr()


def test_litter_of_killed_writers_is_removed_and_nothing_else(tmp_path: Path, log: Log) -> None:
    checkpointer(tmp_path, log).save(state(), step=3, record={}, wait=True)
    (tmp_path / "step_00000004.pt.123.tmp").write_bytes(b"part")
    (tmp_path / "step_00000004.pt.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step_00000003.pt", "step_00000003.pt.json"]
