"""Images made up on the spot: every class has its own coarse pattern under noise, so that a model can learn them.

For smoke tests, for measuring everything but the disk, and for machines without data. Augmentation settings do not
apply here beyond the noise, which is new in each epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data import keyed_random
from data.batch import Batch, EvalLoader, TrainLoader
from data.order import EpochPlan, eval_indices, resolution_at

PATTERN_SIDE = 8  # cells a side of a class's pattern
NOISE_IMAGES = 64  # noise is drawn once and picked by key
DEFAULT_CLASSES = 10
BATCHES_AHEAD = 2  # a fast GPU trains on a batch in the time that it takes to make one


class SyntheticImages:
    """Image `index` of an epoch as a pure function; the patterns are the same in training and evaluation."""

    def __init__(self, num_classes: int, image_size: int, seed: int):
        self.image_size = image_size
        self.num_classes = num_classes
        self.seed = seed
        cells = num_classes * PATTERN_SIDE * PATTERN_SIDE * 3
        pattern = keyed_random.fold_array(keyed_random.fold(0, 1), np.arange(cells)) >> np.uint64(57)  # 0..127
        patterns = pattern.astype(np.uint8).reshape(num_classes, PATTERN_SIDE, PATTERN_SIDE, 3) + np.uint8(32)
        noise = keyed_random.fold_array(keyed_random.fold(0, 2), np.arange(NOISE_IMAGES * image_size * image_size * 3))
        self.noise = (noise >> np.uint64(58)).astype(np.uint8).reshape(NOISE_IMAGES, image_size, image_size, 3)  # 0..63
        cell_of = np.arange(image_size) * PATTERN_SIDE // image_size
        self.lines = patterns[
            :, :, cell_of
        ]  # (classes, PATTERN_SIDE, W, 3): what all pixel lines of a cell have in common
        self.first_line = np.searchsorted(cell_of, np.arange(PATTERN_SIDE + 1))  # of each cell

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return indices % self.num_classes

    def batch(self, indices: np.ndarray, num_samples: int, epoch: int) -> Batch:
        targets = self.targets(indices % num_samples)
        key = keyed_random.domain_key(self.seed, keyed_random.SAMPLE, epoch)
        picks = keyed_random.fold_array(key, indices) % np.uint64(NOISE_IMAGES)
        images = self.noise[picks.astype(np.int64)]  # (B, H, W, 3), a copy
        for cell in range(PATTERN_SIDE):
            images[:, self.first_line[cell] : self.first_line[cell + 1]] += self.lines[targets, cell][:, None]
        pixels = torch.from_numpy(images)
        if torch.cuda.is_available():
            pixels = pixels.pin_memory()
        return Batch(
            pixels.permute(0, 3, 1, 2),
            torch.from_numpy(targets.astype(np.int64)),
            torch.from_numpy(indices.astype(np.int64)),
        )


class SyntheticTrainLoader(TrainLoader):
    def __init__(self, plan: EpochPlan, *, num_classes: int, image_size: int, progressive: tuple[int, ...], seed: int):
        self.plan = plan
        self.seed = seed
        self.num_samples = plan.num_samples
        self.num_classes = num_classes
        self.steps_per_epoch = plan.steps_per_epoch
        self.image_size = image_size
        self.progressive = progressive
        self.source = SyntheticImages(num_classes, resolution_at(0, image_size, progressive), seed)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        size = resolution_at(epoch, self.image_size, self.progressive)
        if size != self.source.image_size:
            self.source = SyntheticImages(self.num_classes, size, self.seed)
        order = self.plan.rank_order(self.seed, epoch, first_step).reshape(-1, self.plan.micro_batch_size)
        coming: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(BATCHES_AHEAD) as threads:
            for indices in order:
                coming.append(threads.submit(self.source.batch, indices, self.num_samples, epoch))
                if len(coming) > BATCHES_AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def close(self) -> None:
        """Nothing is held open."""


class SyntheticEvalLoader(EvalLoader):
    def __init__(
        self, num_samples: int, *, num_classes: int, image_size: int, batch_size: int, rank: int, world_size: int
    ):
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.indices = eval_indices(num_samples, rank, world_size)
        self.source = SyntheticImages(num_classes, image_size, seed=0x5EED)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.indices), self.batch_size):
            yield self.source.batch(self.indices[start : start + self.batch_size], self.num_samples, epoch=0)

    def close(self) -> None:
        """Nothing is held open."""
