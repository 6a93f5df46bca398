"""The loaders: the same bytes whoever reads, every sample once in evaluation, and an end to every failure."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from data import build_eval_loader, build_train_loader
from data.conversion import WriteSettings, write_beton
from data.datasets import ArraySource, list_folder
from data.pixels import EvalPlan, center_cropped, read_image
from mambavision.config import AugmentConfig, DataConfig
from tests.unit.data_samples import make_betons, make_folder

SOURCES = ("ffcv", "folder", "synthetic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder"), train=30, val=37)


@pytest.fixture(scope="module")
def betons(folder, tmp_path_factory):
    return make_betons(folder, tmp_path_factory.mktemp("betons"), write_mode="original")


@pytest.fixture
def config(folder, betons):
    def make(source: str, **settings) -> DataConfig:
        path = {"ffcv": betons, "folder": folder, "synthetic": None}[source]
        values = dict(image_size=32, num_workers=2, synthetic_train_samples=30, synthetic_eval_samples=37, crop_pct=0.9)
        return DataConfig(source=source, path=path and str(path), **{**values, **settings})

    return make


def train(config: DataConfig, epoch: int = 0, first_step: int = 0, world_size: int = 1) -> dict[int, bytes]:
    """Pixels of each sample of an epoch, from all ranks, and a check that batches and targets belong together."""
    pixels = {}
    for rank in range(world_size):
        loader = build_train_loader(
            config, AugmentConfig(), seed=1, global_batch_size=12, micro_batch_size=3, rank=rank, world_size=world_size
        )
        try:
            batches = 0
            for batch in loader.epoch(epoch, first_step):
                assert batch.images.shape == (3, 3, config.image_size, config.image_size)
                assert batch.images.is_contiguous(memory_format=torch.channels_last)
                pixels |= {s: image.numpy().tobytes() for s, image in zip(batch.indices.tolist(), batch.images)}
                batches += 1
            assert batches == (loader.steps_per_epoch - first_step) * 4 // world_size
        finally:
            loader.close()
    return pixels


@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_is_the_same_at_any_world_size_worker_count_and_start(source, config):
    whole = train(config(source))
    assert len(whole) == 24, "the last partial global batch is dropped"
    assert train(config(source, num_workers=1), world_size=2) == whole
    resumed = train(config(source), first_step=1)
    assert len(resumed) == 12 and all(whole[sample] == pixels for sample, pixels in resumed.items())
    other_epoch = train(config(source), epoch=1)
    shared = set(whole) & set(other_epoch)
    assert sum(whole[s] != other_epoch[s] for s in shared) > len(shared) // 2


def test_ffcv_and_folder_draw_the_same_crops_and_operations(config):
    """The files hold the same JPEG bytes; decoders may differ by rounding, another draw would differ by far more."""
    ours, theirs = (train(config(source)) for source in ("ffcv", "folder"))
    assert set(ours) == set(theirs)
    for sample, pixels in ours.items():
        a, b = (np.frombuffer(p, np.uint8).astype(int) for p in (pixels, theirs[sample]))
        assert np.abs(a - b).mean() < 6.0, f"sample {sample}"
    means = [
        np.abs(np.frombuffer(p, np.uint8).astype(int) - np.frombuffer(theirs[s], np.uint8)).mean()
        for s, p in ours.items()
    ]
    assert np.median(means) < 1.0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluation_covers_each_image_once(source, world_size, config):
    seen, right = [], 0
    for rank in range(world_size):
        loader = build_eval_loader(config(source), batch_size=8, rank=rank, world_size=world_size)
        for batch in loader:
            seen += batch.indices.tolist()
            right += int((batch.images.sum((1, 2, 3)) % loader.num_classes == batch.targets).sum())
        assert loader.num_samples == 37
        loader.close()
    assert sorted(seen) == list(range(37))
    assert right == once(config(source))


def once(config: DataConfig) -> int:
    """Right answers of a mock classifier (the pixel sum modulo classes) in one pass of one rank, in one batch."""
    loader = build_eval_loader(config, batch_size=64)
    (batch,) = loader
    loader.close()
    return int((batch.images.sum((1, 2, 3)) % loader.num_classes == batch.targets).sum())


def test_two_iterators_over_one_loader_have_their_own_images(tmp_path):
    """They share a pool of decoding threads."""
    betons = make_betons(make_folder(tmp_path / "folder", train=3, val=240), tmp_path, write_mode="original")
    loader = build_eval_loader(DataConfig(source="ffcv", path=str(betons), image_size=64, num_workers=2), batch_size=60)
    right = {int(i): image.clone() for batch in loader for i, image in zip(batch.indices, batch.images)}
    for _ in range(4):
        for both in zip(loader, loader):
            for batch in both:
                for index, image in zip(batch.indices.tolist(), batch.images):
                    assert torch.equal(image, right[index]), f"sample {index}"
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["native", "stock"])
def test_1003_images_give_the_same_count_at_any_world_size(decoder, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1003, 12, 12, 3), dtype=np.uint8), rng.integers(0, 5, 1003)
    source = ArraySource(images, labels, list("abcde"), "a test")
    write_beton(source, tmp_path / "val.beton", WriteSettings(write_mode="raw", max_resolution=12), num_workers=1)
    data = DataConfig(path=str(tmp_path), image_size=12, num_workers=2, decoder=decoder)
    expected = int((images.sum((1, 2, 3), dtype=np.int64) % 5 == labels).sum())
    for world_size in (1, 2, 3):
        right = 0
        for rank in range(world_size):
            for batch in build_eval_loader(data, batch_size=8, rank=rank, world_size=world_size):
                right += int((batch.images.sum((1, 2, 3)) % 5 == batch.targets).sum())
        assert right == expected


@pytest.mark.parametrize("decoder", ["native", "stock"])
def test_ffcv_evaluation_is_torchvisions(decoder, config, folder):
    source, data = list_folder(folder / "val"), config("ffcv", decoder=decoder)
    for batch in build_eval_loader(data, batch_size=16):
        for index, image in zip(batch.indices.tolist(), batch.images):
            expected = center_cropped(read_image(str(source.path(index))), EvalPlan.create(data))
            difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
            assert difference.mean() < 0.5 and difference.max() <= 8


@pytest.mark.slow
def test_stock_ffcv_still_trains_with_every_operation(config):
    with_operations = train(config("ffcv", decoder="stock"))
    assert len(with_operations) == 24


@pytest.mark.slow
def test_repeated_augmentation_and_resolution_reach_the_ffcv_loader(config):
    data = config("ffcv", repeated_augmentation=2, progressive_resolution=(32, 64, 0, 1), image_size=64)
    loader = build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=12, micro_batch_size=6)
    first, second = (next(iter(loader.epoch(0))).images.clone() for _ in range(2))
    assert torch.equal(first, second) and first.shape[-1] == 32
    batches = [(b.indices.clone(), b.images.clone()) for b in loader.epoch(1)]
    assert batches[0][1].shape[-1] == 64
    assert torch.equal(batches[0][0] + 30, batches[1][0]), "the second copy of each image is in the other micro-batch"
    assert not torch.equal(batches[0][1], batches[1][1])
    loader.close()


def train_loader(data: DataConfig):
    return build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=30, micro_batch_size=15)


@pytest.mark.slow
def test_an_exception_in_ffcvs_thread_reaches_the_caller(config, monkeypatch):
    from data import ffcv_ops

    loader = train_loader(config("ffcv"))
    monkeypatch.setattr(
        ffcv_ops.EpochIterator, "run_pipeline", lambda *_: (_ for _ in ()).throw(MemoryError("no room for it"))
    )
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 0 .* failed: MemoryError: no room for it"):
        list(loader.epoch(0))
    assert time.monotonic() - started < 10


def test_a_slot_is_decoded_into_only_after_the_gpu_has_read_it(monkeypatch):
    from data import ffcv_ops

    happened = []

    class Event:
        def synchronize(self) -> None:
            happened.append("read")

    monkeypatch.setattr(ffcv_ops.EpochIterator, "run_pipeline", lambda *_: happened.append("decoded"))
    iterator = ffcv_ops.GuardedIterator.__new__(ffcv_ops.GuardedIterator)  # no thread
    iterator.close = lambda: None
    iterator.run_pipeline(0, np.arange(3), 0, None)  # a slot's first batch
    iterator.run_pipeline(5, np.arange(3), 0, Event())
    assert happened == ["decoded", "read", "decoded"]


@pytest.mark.slow
def test_a_stall_is_named_and_then_ends(config, monkeypatch, caplog):
    from data import ffcv_ops

    loader = train_loader(config("ffcv", stall_warning_seconds=0.1, timeout_seconds=1.2))
    monkeypatch.setattr(ffcv_ops.EpochIterator, "run_pipeline", lambda *_: time.sleep(4))
    with pytest.raises(TimeoutError, match=r"rank 0 .*data\.timeout_seconds=1\.2"):
        list(loader.epoch(0))
    assert "waiting for data since" in caplog.text and os.uname().nodename in caplog.text


def test_workers_ignore_signals_and_a_killed_one_ends_the_run(config):
    loader = train_loader(config("folder"))
    next(loader.epoch(0))
    workers = loader.workers.loader._iterator._workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(workers[0].pid, number)
    assert len(list(loader.epoch(1))) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="worker"):
        for epoch in range(50):
            list(loader.epoch(epoch))
    assert time.monotonic() - started < 30
    loader.close()


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (dict(source="ffcv", path="/nowhere"), "data.path=/nowhere is not a directory"),
        (dict(source="folder", path="/nowhere"), "data.path=/nowhere is not a directory"),
        (dict(source="ffcv", path=None), "needs data.path"),
        (dict(source="tfrecord"), "ffcv, folder, synthetic"),
        (dict(source="synthetic", num_workers=0, synthetic_train_samples=3), "trainer.global_batch_size"),
    ],
)
def test_data_that_is_not_there_is_answered_with_advice(settings, advice):
    with pytest.raises(ValueError, match=advice):
        train_loader(DataConfig(**settings))


def test_class_folders_given_as_beton_files_are_answered_with_both_ways_out(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"train.beton is not there; write it with .*prepare_data.py, or .*data=folder"
    ):
        train_loader(DataConfig(source="ffcv", path=str(tmp_path)))


def test_an_epoch_through_ffcv_leaves_torchs_threads_alone(config):
    """FFCV sets torch's thread count for the whole process in each epoch."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        train(config("ffcv", num_workers=1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow  # imports torch and numba once more
def test_building_an_ffcv_loader_leaves_torchs_threads_alone():
    """Training on .beton files used one core: importing ffcv had set torch's thread count to 1."""
    program = (
        "import torch, data; from mambavision.config import DataConfig\n"
        "torch.set_num_threads(2)\n"
        "try: data.build_eval_loader(DataConfig(source='ffcv', path='/no/such/directory'), batch_size=1)\n"
        "except ValueError as error: print(error)\n"
        "import sys; print('ffcv' in sys.modules, torch.get_num_threads())\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "True 2", answer.stdout
