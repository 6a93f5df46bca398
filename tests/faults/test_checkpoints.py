"""Checkpoints that were damaged, that are somebody else's, and disks that do not take new ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from mambavision.engine import checkpoint
from tests.faults.harness import STEPS, WRITES_WAITED_FOR, Trainer, newest, state_hash, valid_steps

pytestmark = pytest.mark.faults


@pytest.fixture
def stopped(train: Trainer) -> Path:
    """A run of one rank that was stopped at step 12, with checkpoints at 8, 10 and 12."""
    training = train.run("run", WRITES_WAITED_FOR, fault="term@11", ranks=1)
    assert training.code == 75
    assert valid_steps(training.directory) == [8, 10, 12]
    return training.directory


def cut(length: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path, length(path.stat().st_size))

    return damage


def flip_a_bit_of_a_weight(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut(lambda size: 0), "it has 0 bytes"),
        (cut(lambda size: size // 2), "bytes where"),
        (cut(lambda size: size - 1), "bytes where"),
        (flip_a_bit_of_a_weight, "its checksum does not match"),
    ],
    ids=["empty", "half", "one byte short", "one bit flipped"],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_its_reason(
    train: Trainer, stopped: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(newest(stopped))
    again = train.run("run", "trainer.max_steps=13", ranks=1)
    assert again.code == 0
    assert again.events("start")[-1]["resumed_from"] == "step_00000010.pt"
    warning = again.events("warning")[-1]["message"]
    assert warning.startswith("step_00000012.pt is passed over: ")
    assert reason in warning
    assert (stopped / "checkpoints/step_00000012.pt.damaged").exists()


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """A valid checkpoint with other content."""
    state = checkpoint.load(path)
    change(state)
    record = checkpoint.read_sidecar(path)
    checkpoint.write(path, state, {k: v for k, v in record.items() if k not in ("bytes", "xxh3_128")})
    assert checkpoint.verify(path) is None


def test_a_checkpoint_of_another_model_is_refused_with_the_difference_and_nothing_is_overwritten(
    train: Trainer, stopped: Path
) -> None:
    def other_model(state: dict) -> None:
        del state["model"]["head.weight"]
        name = next(k for k, v in state["model"].items() if v.ndim == 4)
        state["model"][name] = state["model"][name][:1]

    rewrite(newest(stopped), other_model)
    before = {p: p.read_bytes() for p in (stopped / "checkpoints").iterdir()} | {
        p: p.read_bytes() for p in [stopped / "config.yaml"]
    }
    again = train.run("run", ranks=2)
    assert again.code == 1
    assert again.status["status"] == "failed"
    assert "missing: head.weight" in again.output
    assert "the checkpoint has (1, " in again.output
    assert {p: p.read_bytes() for p in before} == before


def test_with_every_checkpoint_damaged_the_run_stops_and_never_starts_over(train: Trainer, stopped: Path) -> None:
    for path in checkpoint.list_checkpoints(stopped / "checkpoints"):
        flip_a_bit_of_a_weight(path)
    again = train.run("run", ranks=2)
    assert again.code == 1
    assert "none of the 3 checkpoints" in again.output
    assert again.status["status"] == "failed"
    assert len(list((stopped / "checkpoints").glob("step_*.pt"))) == 3
    assert len(again.events("start")) == 1


def test_a_checkpoint_path_that_does_not_exist_is_an_error_at_once(train: Trainer) -> None:
    refused = train.run("run", "model.checkpoint=/does/not/exist.pt", ranks=1)
    assert refused.code == 2
    assert "model.checkpoint=/does/not/exist.pt does not exist" in refused.output
    assert not refused.directory.exists()


class Intruder:
    def __reduce__(self) -> tuple:
        return os.system, ("touch intruded",)


def test_code_in_a_checkpoint_is_refused_not_run(train: Trainer, stopped: Path) -> None:
    path = newest(stopped)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in content if n.endswith("data.pkl"))
    content[name] = pickle.dumps({"model": Intruder()}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    record = checkpoint.read_sidecar(path)
    record |= {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}
    checkpoint.sidecar(path).write_text(json.dumps(record))
    again = train.run("run", ranks=1)
    assert again.code == 2
    assert "more than tensors and plain values" in again.output
    assert not Path("intruded").exists()


def test_a_full_disk_costs_a_checkpoint_not_the_run(train: Trainer, stopped: Path) -> None:
    """Files may not grow beyond 4 MB, half a checkpoint: what a full disk or a quota does, without root."""
    full = train.run("run", "trainer.max_steps=16", ranks=1, FILE_SIZE_LIMIT="4000000")
    failures = full.events("checkpoint_failed")
    assert failures[0]["step"] == 15
    assert "MiB free in" in failures[0]["cause"]
    assert full.code == 1  # the last checkpoint is waited for, and never came
    assert full.status["status"] == "failed"
    assert "Free space or give another output_dir" in full.status["cause"]
    assert valid_steps(full.directory)[-1] == 12
    assert not list((full.directory / "checkpoints").glob("*.tmp"))
    again = train.run("run", "trainer.max_steps=16", ranks=1)
    assert again.code == 0
    assert valid_steps(again.directory)[-1] == 16


def test_a_checkpoint_directory_that_vanishes_is_made_again(train: Trainer, stopped: Path) -> None:
    training = train.start("run", ranks=1, fault="sleep2@14")
    training.wait_for_step(13)
    shutil.rmtree(stopped / "checkpoints")
    assert training.wait() == 0
    assert valid_steps(training.directory)[-1] == STEPS


def test_a_run_directory_that_is_away_for_a_while_is_written_again(train: Trainer, stopped: Path) -> None:
    """As an NFS server that comes back: the first writes fail, a later one succeeds."""
    training = train.start("run", ranks=1, fault="sleep2@14,sleep2@18")
    training.wait_for_step(13)
    away = stopped.with_name("away")
    stopped.rename(away)
    training.wait_for(lambda: "could not be written, training goes on" in training.output)
    away.rename(stopped)
    assert training.wait() == 0
    assert training.status["status"] == "finished"
    assert valid_steps(training.directory)[-1] == STEPS


def test_a_log_that_cannot_be_written_changes_nothing(train: Trainer, uninterrupted, reference: str) -> None:
    directory = train.output_dir / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").symlink_to("/dev/full")
    training = train.run("run")
    assert training.code == 0
    assert "lines lost so far" in training.output
    assert state_hash(training.directory) == reference


def test_weights_are_finite_in_every_checkpoint_kept(train: Trainer, stopped: Path) -> None:
    for path in checkpoint.list_checkpoints(stopped / "checkpoints"):
        assert all(torch.isfinite(t).all() for t in checkpoint.load(path)["model"].values())
