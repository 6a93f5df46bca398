"""Loaders over class folders of image files: torch's DataLoader with worker processes, Pillow, keyed augmentation.

A worker is handed (epoch, sample, image size) and keeps no state, so that any number of workers makes the same batches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from torch.utils.data import Dataset

from data import keyed_random
from data.augment import AugmentPlan
from data.batch import Batch, EvalLoader, TrainLoader
from data.class_names import class_names
from data.corrupt import CorruptImages, UnreadableImages
from data.datasets import FolderSource, find_split, list_folder
from data.folder_workers import Made, Task, Workers
from data.order import EpochPlan, eval_indices, resolution_at
from data.pixels import UNREADABLE, EvalPlan, augmented, center_cropped, read_whole, why_unreadable
from mambavision.config import AugmentConfig, DataConfig


class TrainImages(Dataset):
    """Augmented samples. An unreadable image is replaced by the next one of the folder, whatever the run was before."""

    def __init__(self, source: FolderSource, data: DataConfig, augment: AugmentConfig, seed: int):
        self.source = source
        self.skip = data.corrupt_images == "skip"
        self.seed = seed
        sizes = {resolution_at(epoch, data.image_size, data.progressive_resolution) for epoch in _ramp(data)}
        self.plans = {
            size: AugmentPlan.create(augment, image_size=size, seed=seed, mean=data.mean) for size in sorted(sizes)
        }

    def __getitem__(self, task: Task) -> Made:
        key = keyed_random.sample_key(self.seed, task.epoch, task.sample)
        count = len(self.source.names)
        failures: list[tuple[int, str]] = []
        for step in range(count if self.skip else 1):
            image = (task.sample + step) % count
            try:
                content, _ = read_whole(self.source.read(image))
            except UNREADABLE as error:
                failures.append((image, why_unreadable(error)))
                continue
            pixels = augmented(content, key, self.plans[task.image_size])
            return Made(pixels, int(self.source.labels[image]), task.sample, tuple(failures))
        return Made(None, -1, task.sample, tuple(failures))


def _ramp(data: DataConfig) -> range:
    """Epochs after which the image size stays."""
    return range(data.progressive_resolution[3] + 1) if len(data.progressive_resolution) == 4 else range(1)


class EvalImages(Dataset):
    def __init__(self, source: FolderSource, data: DataConfig):
        self.source = source
        self.plan = EvalPlan.create(data)

    def __getitem__(self, task: Task) -> Made:
        try:
            content, _ = read_whole(self.source.read(task.sample))
        except UNREADABLE as error:
            return Made(None, -1, task.sample, ((task.sample, why_unreadable(error)),))
        return Made(center_cropped(content, self.plan), int(self.source.labels[task.sample]), task.sample, ())


class FolderTrainLoader(TrainLoader):
    def __init__(self, data: DataConfig, augment: AugmentConfig, *, seed: int, batches: dict[str, int]):
        self.data, self.seed = data, seed
        source = split_source(data, "train")
        self.plan = EpochPlan(len(source.names), **batches)
        self.num_samples = self.plan.num_samples
        self.num_classes = len(source.classes)
        self.class_names = class_names(source.classes)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.fingerprint = _fingerprint(source)
        self.corrupt = CorruptImages(data.corrupt_images, data.max_corrupt_fraction)
        self.workers = Workers(TrainImages(source, data, augment, seed), data, source=source, rank=self.plan.rank)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches from `first_step` on."""
        size = resolution_at(epoch, self.data.image_size, self.data.progressive_resolution)
        order = self.plan.rank_order(self.seed, epoch, first_step)
        self.corrupt.start_epoch(self.plan.samples_per_rank)
        made_batches = self.workers.run(
            order.reshape(-1, self.plan.micro_batch_size),
            self.corrupt,
            "the next readable image takes its place",
            epoch=epoch,
            image_size=size,
        )
        for made in made_batches:
            if len(made.targets) < self.plan.micro_batch_size:
                raise UnreadableImages(f"no image of {self.workers.source.root} can be read")
            yield Batch(made.images.permute(0, 3, 1, 2), made.targets, made.samples)

    def close(self) -> None:
        self.workers.close()


class FolderEvalLoader(EvalLoader):
    """This rank's share, each sample once; unreadable ones are left out, named and counted."""

    def __init__(self, data: DataConfig, source: FolderSource, *, batch_size: int, rank: int, world_size: int):
        self.names = source.names
        self.batch_size = batch_size
        self.num_samples = len(source.names)
        self.num_classes = len(source.classes)
        self.class_names = class_names(source.classes)
        self.fingerprint = _fingerprint(source)
        self.indices = eval_indices(self.num_samples, rank, world_size)
        self.corrupt = CorruptImages(data.corrupt_images, data.max_corrupt_fraction)
        self.workers = Workers(EvalImages(source, data), data, source=source, rank=rank)

    def __iter__(self) -> Iterator[Batch]:
        self.corrupt.start_epoch(len(self.indices))
        starts = range(0, len(self.indices), self.batch_size)
        batches = [self.indices[start : start + self.batch_size] for start in starts]
        for made in self.workers.run(batches, self.corrupt, "it is left out of the evaluation"):
            if len(made.targets):
                yield Batch(made.images.permute(0, 3, 1, 2), made.targets, made.samples)

    def close(self) -> None:
        self.workers.close()


def split_source(data: DataConfig, split: str) -> FolderSource:
    """A split's images, numbered by the training set's classes where it is there."""
    if data.path is None:
        raise ValueError("data.source=folder needs data.path: a directory with train/ and val/ (or test/)")
    directory = find_split(data.path, split)
    classes = None
    if split != "train" and (directory.parent / "train").is_dir():
        classes = sorted(entry.name for entry in os.scandir(directory.parent / "train") if entry.is_dir())
        classes = [name for name in classes if not name.startswith(".")]
    source = list_folder(directory, classes=classes)
    if data.num_classes is not None and data.num_classes != len(source.classes):
        raise ValueError(
            f"data.num_classes={data.num_classes}, but {directory} has {len(source.classes)} class folders; "
            "leave data.num_classes out to take the folders"
        )
    return source


def _fingerprint(source: FolderSource) -> str:
    """Names and labels; not the pixels, which would have to be read."""
    digest = hashlib.sha256(os.fsencode("\n".join(source.names)))
    digest.update(source.labels.tobytes())
    return digest.hexdigest()[:16]
