"""What a start says when its directory cannot be used, and which kernels it chooses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from mambavision.distributed import World
from mambavision.engine.admission import failures_in_status, on_main_in_directory
from mambavision.engine.session import choose_kernels
from mambavision.run_dir import RunDirectory
from mambavision.run_lock import RunLock

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_at_the_start_is_advice_and_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot use {tmp_path}: No space left on device; free space"):
        on_main_in_directory(WORLD, RunDirectory(tmp_path), full_disk)


def test_a_storage_that_is_away_for_a_while_is_no_refusal(tmp_path: Path) -> None:
    """A refused run is not put back into the queue."""

    def stale() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(OSError, match="Stale file handle"):
        on_main_in_directory(WORLD, RunDirectory(tmp_path), stale)


def test_checkpoints_that_cannot_be_written_are_found_before_the_training(tmp_path: Path) -> None:
    """A colleague's directory below a shared one, for instance."""
    (tmp_path / "checkpoints" / "writable").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot write the run directory .*: Is a directory \(.*checkpoints"):
        RunDirectory(tmp_path).create()


def test_a_status_that_cannot_be_written_does_not_hide_why_the_start_failed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 10)
    lock.acquire()
    (tmp_path / "status.json").mkdir()
    with (
        pytest.raises(ValueError, match="the data set has 3 classes"),
        failures_in_status(RunDirectory(tmp_path), WORLD, lock),
    ):
        raise ValueError("the data set has 3 classes")


def test_a_start_without_deterministic_kernels_does_not_wait_for_torchs_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch imports it when it is asked to choose: 900 modules, four to ten seconds of every start."""
    calls: list[object] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *arguments, **_: calls.append(arguments))
    choose_kernels(False)
    assert calls == []


@pytest.mark.slow
def test_deterministic_kernels_are_for_the_run_that_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The points of a sweep share a process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    choose_kernels(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "torch names cuBLAS as not deterministic without it"
    choose_kernels(False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
