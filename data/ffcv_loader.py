"""Loaders over .beton files: FFCV's core behind an order, a file check, an iterator and an evaluation of our own.

Training decodes with the native keyed decoder (data/native_decoder.py), or with FFCV's own operations where
data.decoder=stock or no compiler is there. Evaluation is exact either way: without the native decoder, Pillow decodes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numba
import numpy as np
import torch
from ffcv.loader import Loader
from PIL import Image

from data.augment import AugmentPlan
from data.batch import Batch, EvalLoader, TrainLoader, workers_per_rank
from data.beton import RAW, Beton, open_beton
from data.class_names import class_names
from data.corrupt import CorruptImages
from data.ffcv_ops import GivenOrder, GuardedIterator, StockAugment, image_pipeline, image_tensor
from data.manifest import check_numbering, read_names, verify
from data.names import Names
from data.native_decoder import KeyedDecoder
from data.native_library import NativeUnavailable
from data.order import EpochPlan, eval_indices, resolution_at
from data.pixels import UNREADABLE, EvalPlan, center_cropped, read_image, why_unreadable
from mambavision.config import AugmentConfig, DataConfig

logger = logging.getLogger(__name__)


class BetonFile:
    """A .beton that passed its checks, with the names of its classes and samples."""

    def __init__(self, data: DataConfig, split: str):
        if data.path is None:
            raise ValueError(f"data.source=ffcv needs data.path: the directory of {split}.beton")
        directory = Path(data.path).expanduser()
        if not directory.is_dir():
            raise ValueError(f"data.path={directory} is not a directory; scripts/prepare_data.py writes one")
        self.path = directory / f"{split}.beton"
        self.beton: Beton = open_beton(self.path)
        self.manifest = verify(self.beton, checksum=data.verify_checksum)
        check_numbering(self.path, self.manifest)
        self.classes = self.manifest.classes
        self.fingerprint = f"{self.beton.index_hash}-{self.manifest.data_hash}"
        if data.num_classes is not None and data.num_classes != len(self.classes):
            raise ValueError(
                f"data.num_classes={data.num_classes}, but {self.path} has {len(self.classes)} classes; "
                "leave data.num_classes out to take the file's"
            )

    def name(self, image: int) -> str:
        label = f"{self.path.name}[{image}]"
        return f"{label} ({self._names[image]})" if image < len(self._names) else label

    @cached_property
    def _names(self) -> Names:
        return Names(read_names(self.path) or ())


def _native_decoder(data: DataConfig, plan: AugmentPlan | EvalPlan, file: BetonFile) -> KeyedDecoder | None:
    """The native decoder, or None where it was not asked for or cannot be built (with one warning)."""
    if data.decoder not in ("native", "stock"):
        raise ValueError(f"data.decoder={data.decoder} is not known; take native or stock")
    if data.decoder == "stock":
        return None
    try:
        return KeyedDecoder(
            plan,
            num_samples=len(file.beton),
            corrupt=data.corrupt_images,
            path=file.path,
            num_threads=workers_per_rank(data.num_workers),
        )
    except NativeUnavailable as error:
        if isinstance(plan, AugmentPlan):
            logger.warning(
                "the native decoder cannot be used (%s); FFCV's own decodes instead: slower, its crops are not "
                "reproducible and damaged images go unnoticed. Install a C++ compiler and libjpeg's headers, "
                "or set data.decoder=stock to say that this is meant",
                error,
            )
        return None


def _numba_threads(data: DataConfig) -> int:
    """What FFCV is told; numba refuses more than there are cores. The native decoder has threads of its own."""
    return min(workers_per_rank(data.num_workers), numba.config.NUMBA_NUM_THREADS)


class FfcvTrainLoader(TrainLoader):
    def __init__(self, data: DataConfig, augment: AugmentConfig, *, seed: int, batches: dict[str, int]):
        self.data, self.augment, self.seed = data, augment, seed
        self.file = BetonFile(data, "train")
        self.plan = EpochPlan(len(self.file.beton), **batches)
        self.num_samples = self.plan.num_samples
        self.num_classes = len(self.file.classes)
        self.class_names = class_names(self.file.classes)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.fingerprint = self.file.fingerprint
        self.corrupt = CorruptImages(data.corrupt_images, data.max_corrupt_fraction)
        self._size = 0
        self._iterator: GuardedIterator | None = None
        self._stock: StockAugment | None = None
        self._build(resolution_at(0, data.image_size, data.progressive_resolution))

    def _build(self, size: int) -> None:
        """FFCV's loader for an image size; another size (progressive resolution) is another loader."""
        self.close()
        plan = AugmentPlan.create(self.augment, image_size=size, seed=self.seed, mean=self.data.mean)
        workers = _numba_threads(self.data)
        self._native = _native_decoder(self.data, plan, self.file)
        self._stock = None if self._native else StockAugment(plan, workers)
        self._order = GivenOrder(np.arange(self.num_samples, dtype=np.uint64))
        self._loader = Loader(
            str(self.file.path),
            batch_size=self.plan.micro_batch_size,
            num_workers=workers,
            # Repetitions have numbers beyond the file's samples, which only the memory map does not look up by page.
            os_cache=self.data.os_cache or self.plan.repeats > 1,
            order=self._order,
            drop_last=False,
            seed=0,
            pipelines=image_pipeline(self._native or self._stock.decoder()),
        )
        if self.plan.repeats > 1:
            self._loader.reader.metadata = np.tile(self._loader.reader.metadata, self.plan.repeats)
        self._size = size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches from `first_step` on. Ends the epoch that was running before."""
        self._stop()
        size = resolution_at(epoch, self.data.image_size, self.data.progressive_resolution)
        if size != self._size:
            self._build(size)
        if self._native:
            self._native.set_epoch(epoch)
        order = self.plan.rank_order(self.seed, epoch, first_step)
        self.corrupt.start_epoch(self.plan.samples_per_rank)
        if not len(order):
            return
        iterator = self._iterator = GuardedIterator(
            self._loader,
            order.astype(np.uint64),
            rank=self.plan.rank,
            stall_warning=self.data.stall_warning_seconds,
            timeout=self.data.timeout_seconds,
        )
        replaced: dict[int, int] = {}
        try:
            for samples in order.reshape(-1, self.plan.micro_batch_size):
                (images,) = next(iterator)
                images_of = samples % self.num_samples
                if self._native:
                    replaced.update(self._report_failures())
                    for position, sample in enumerate(samples.tolist() if replaced else ()):
                        images_of[position] = replaced.get(sample, images_of[position])
                else:
                    self._stock.finish(images, samples, epoch)
                targets = self.file.beton.labels[images_of]
                yield Batch(image_tensor(images), torch.from_numpy(targets), torch.from_numpy(samples))
        finally:
            iterator.close()

    def _report_failures(self) -> dict[int, int]:
        failures = self._native.take_failures()
        for failure in failures:
            image = failure.sample % self.num_samples
            consequence = f"image {failure.replacement} takes its place"
            self.corrupt.report(self.file.name(image), failure.reason, consequence)
        return {failure.sample: failure.replacement for failure in failures}

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def close(self) -> None:
        self._stop()
        if self._stock is not None:
            self._stock.close()


class FfcvEvalLoader(EvalLoader):
    """This rank's share of an evaluation file, each sample once; unreadable ones are left out, named and counted."""

    def __init__(self, data: DataConfig, *, batch_size: int, rank: int, world_size: int, split: str):
        self.file = BetonFile(data, split)
        self.names = read_names(self.file.path)
        self.data = data
        self.batch_size = batch_size
        self.rank = rank
        self.num_samples = len(self.file.beton)
        self.num_classes = len(self.file.classes)
        self.class_names = class_names(self.file.classes)
        self.fingerprint = self.file.fingerprint
        self.indices = eval_indices(self.num_samples, rank, world_size)
        self.corrupt = CorruptImages(data.corrupt_images, data.max_corrupt_fraction)
        self.plan = EvalPlan.create(data)
        self.workers = _numba_threads(data)
        self._native = _native_decoder(data, self.plan, self.file)
        self._loader: Loader | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.corrupt.start_epoch(len(self.indices))
        if not len(self.indices):
            return iter(())
        return self._decode_natively() if self._native else self._decode_with_pillow()

    def _decode_natively(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = Loader(
                str(self.file.path),
                batch_size=self.batch_size,
                num_workers=self.workers,
                os_cache=self.data.os_cache,
                order=GivenOrder(self.indices.astype(np.uint64)),
                drop_last=False,
                seed=0,
                pipelines=image_pipeline(self._native),
            )
        iterator = GuardedIterator(
            self._loader,
            self.indices.astype(np.uint64),
            rank=self.rank,
            stall_warning=self.data.stall_warning_seconds,
            timeout=self.data.timeout_seconds,
        )
        unreadable: set[int] = set()
        try:
            for start in range(0, len(self.indices), self.batch_size):
                indices = self.indices[start : start + self.batch_size]
                (images,) = next(iterator)
                for failure in self._native.take_failures():
                    unreadable.add(failure.sample)
                    self._left_out(failure.sample, failure.reason)
                kept = np.array([index not in unreadable for index in indices.tolist()])
                if kept.any():
                    yield self._batch(images if kept.all() else images[kept], indices[kept])
        finally:
            iterator.close()

    def _decode_with_pillow(self) -> Iterator[Batch]:
        starts = range(0, len(self.indices), self.batch_size)
        with ThreadPoolExecutor(self.workers) as threads:
            ahead = deque[list]()
            for start in (*starts, None, None):  # two batches are decoded ahead
                if start is not None:
                    indices = self.indices[start : start + self.batch_size].tolist()
                    ahead.append([(index, threads.submit(self._decode_one, index)) for index in indices])
                if len(ahead) > 2 or start is None:
                    if not ahead:
                        return
                    decoded = [(index, future.result()) for index, future in ahead.popleft()]
                    for index, image in decoded:
                        if isinstance(image, str):
                            self._left_out(index, image)
                    kept = [(index, image) for index, image in decoded if not isinstance(image, str)]
                    if kept:
                        yield self._batch(
                            np.stack([image for _, image in kept]), np.array([index for index, _ in kept])
                        )

    def _decode_one(self, index: int) -> np.ndarray | str:
        """The image, or why it cannot be read."""
        stored = self.file.beton.stored(index)
        try:
            if stored.mode == RAW:
                image = Image.frombytes("RGB", (stored.width, stored.height), stored.data)
            else:
                image = read_image(stored.data)
        except UNREADABLE as error:
            return why_unreadable(error)
        return center_cropped(image, self.plan)

    def _left_out(self, index: int, reason: str) -> None:
        self.corrupt.report(self.file.name(index), reason, "it is left out of the evaluation")

    def _batch(self, images: np.ndarray, indices: np.ndarray) -> Batch:
        targets = torch.from_numpy(self.file.beton.labels[indices])
        return Batch(image_tensor(images), targets, torch.from_numpy(indices.astype(np.int64)))

    def close(self) -> None:
        """Iterators close themselves; files are mapped read-only."""
