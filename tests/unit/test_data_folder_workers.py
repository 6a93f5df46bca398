"""Worker processes of the folder loader: passes that are given up, and files that never come."""

import os
import time

import pytest

from data import build_train_loader
from data.datasets import FolderSource
from mambavision.config import AugmentConfig, DataConfig
from tests.unit.data_samples import make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path, train=30, val=3)


@pytest.mark.slow
def test_a_pass_begun_while_slow_workers_finish_another_waits_for_them(folder, monkeypatch):
    """After a rollback, from a file system that takes longer for a batch than dead workers may go unnoticed."""
    monkeypatch.setattr("data.folder_workers.POLL_SECONDS", 0.2)
    read = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda source, index: time.sleep(0.1) or read(source, index))
    loader = small_batches(DataConfig(source="folder", path=str(folder), image_size=32, num_workers=1))
    next(loader.epoch(0))
    samples = [sample for batch in loader.epoch(0, 3) for sample in batch.indices.tolist()]
    assert samples == loader.plan.rank_order(0, 0, 3).tolist() and len(samples) == 12
    loader.close()


def test_a_pass_that_another_has_ended_does_not_hand_out_its_batches(folder):
    loader = small_batches(DataConfig(source="folder", path=str(folder), image_size=32, num_workers=2))
    first, second = loader.epoch(0), loader.epoch(1)
    next(first)
    assert next(second).indices.tolist() == loader.plan.rank_order(0, 1)[:3].tolist()
    with pytest.raises(RuntimeError, match="ended by the one that was begun after it"):
        next(first)
    assert len(list(second)) == 9
    loader.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="who opens a pipe without a writer waits for ever")
def test_a_worker_that_waits_for_a_file_for_ever_does_not_outlive_its_loader(tmp_path, monkeypatch):
    """It would keep the rank from ending after data.timeout_seconds."""
    monkeypatch.setattr("data.folder_workers.POLL_SECONDS", 0.2)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    os.mkfifo(make_folder(tmp_path, train=5) / "train/class_0/away.jpg")
    loader = small_batches(DataConfig(source="folder", path=str(tmp_path), num_workers=1, timeout_seconds=1))
    with pytest.raises(TimeoutError, match="is the file system there"):
        list(loader.epoch(0))
    (worker,) = loader.workers.loader._iterator._workers
    assert worker.is_alive()
    loader.close()
    assert not worker.is_alive()


def small_batches(data: DataConfig):
    return build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=6, micro_batch_size=3)
