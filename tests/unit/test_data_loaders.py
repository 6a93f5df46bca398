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


@pytest.fixture
def broken_folder(tmp_path):
    root = make_folder(tmp_path / "broken", train=30, val=9)
    for split, number in (("train", 7), ("val", 4)):
        path = next((root / split).rglob(f"{number:04d}.jpg"))
        path.write_bytes(path.read_bytes()[:300])
    return root


def train_loader(data: DataConfig):
    return build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=30, micro_batch_size=15)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_unreadable_image_is_replaced_by_the_next_and_named(broken_folder, num_workers, caplog):
    data = DataConfig(
        source="folder", path=str(broken_folder), image_size=32, num_workers=num_workers, max_corrupt_fraction=0.1
    )
    loader, source = train_loader(data), list_folder(broken_folder / "train")
    broken = next(i for i, name in enumerate(source.names) if name.endswith("0007.jpg"))
    targets = {}
    for batch in loader.epoch(0):
        targets |= dict(zip(batch.indices.tolist(), batch.targets.tolist()))
    loader.close()
    assert len(targets) == 30 and targets[broken] == source.labels[broken + 1]
    assert list(loader.corrupt.found) == [str(source.path(broken))] and "0007.jpg" in caplog.text


def test_too_many_unreadable_images_and_the_stop_policy_end_the_run(broken_folder):
    for settings, advice in (({}, "max_corrupt_fraction"), ({"corrupt_images": "stop"}, "corrupt_images=skip")):
        data = DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1, **settings)
        loader = train_loader(data)
        with pytest.raises(RuntimeError, match=advice) as error:
            list(loader.epoch(0))
        assert "0007.jpg" in str(error.value)
        loader.close()


def test_resuming_late_in_an_epoch_does_not_shrink_the_budget(broken_folder):
    """The budget is a share of the epoch, not of what is left of it."""
    data = DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1, max_corrupt_fraction=0.05)
    loader = build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=3, micro_batch_size=3)
    broken = next(i for i, name in enumerate(loader.workers.source.names) if name.endswith("0007.jpg"))
    step = loader.plan.order(0, 0).tolist().index(broken) // 3
    batches = sum(1 for _ in loader.epoch(0, first_step=step))
    loader.close()
    assert batches == 10 - step and loader.corrupt.count == 1


def test_evaluation_leaves_an_unreadable_image_out(broken_folder, caplog):
    data = DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1, max_corrupt_fraction=0.2)
    loader = build_eval_loader(data, batch_size=4)
    assert sum(len(batch) for batch in loader) == 8 and "0004.jpg" in caplog.text
    loader.close()


def test_damage_inside_a_beton_is_noticed_replaced_and_named(tmp_path, caplog):
    from data.beton import open_beton

    make_betons(make_folder(tmp_path / "in", train=30, val=9), tmp_path, write_mode="jpg")
    for split, image in (("train", 11), ("val", 3)):
        beton = open_beton(tmp_path / f"{split}.beton")
        start, size = int(beton.images["data_ptr"][image]), int(beton.sizes[image])
        with open(beton.path, "r+b") as file:
            file.seek(start + size // 3)
            file.write(bytes(size // 2))
    data = DataConfig(path=str(tmp_path), image_size=32, num_workers=2, max_corrupt_fraction=0.2)
    loader = train_loader(data)
    labels = open_beton(tmp_path / "train.beton").labels
    targets = {}
    for batch in loader.epoch(0):
        targets |= dict(zip(batch.indices.tolist(), batch.targets.tolist()))
    assert targets[11] == labels[12] and "train.beton[11]" in caplog.text
    evaluation = build_eval_loader(data, batch_size=4)
    assert sorted(i for batch in evaluation for i in batch.indices.tolist()) == [0, 1, 2, 4, 5, 6, 7, 8]


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
    with pytest.raises((ValueError, FileNotFoundError), match=advice):
        train_loader(DataConfig(**settings))


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
