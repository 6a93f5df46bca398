"""Which sample is seen when: pure functions of (seed, epoch, position).

Nothing here depends on the world size, the number of workers or what was read before. Step s of an epoch consumes the
positions [s * global_batch, (s + 1) * global_batch) of the epoch's order; micro-batch k of that step is the k-th run of
micro_batch positions in it; rank r of W computes micro-batches [r * a, (r + 1) * a) with a = global / (micro * W).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data import keyed_random


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of [0, num_samples) in which an epoch visits its samples, (num_samples,) int64.

    Samples are sorted by a hash of (seed, epoch, sample), not shuffled by a library's generator: no library version can
    change the order of a run that is resumed next year.
    """
    key = keyed_random.domain_key(seed, keyed_random.ORDER, epoch)
    return np.argsort(keyed_random.fold_array(key, np.arange(num_samples)), kind="stable")


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch is cut into steps and micro-batches, and which of them are this rank's.

    With `repeats` > 1 (repeated augmentation, Hoffer et al. 2020) a step holds global_batch_size / repeats different
    images, each `repeats` times and as far apart as can be. As in timm and DeiT the epoch keeps its number of steps and
    sees 1 / repeats of the images, a fresh part each epoch. Repetition r of image i is sample i + r * num_samples.
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        g, m, w = self.global_batch_size, self.micro_batch_size, self.world_size
        if g < 1 or m < 1 or g % (m * w):
            nearest = sorted({max(1, g // (m * w)) * m * w, (g // (m * w) + 1) * m * w})
            raise ValueError(
                f"trainer.global_batch_size={g} is not a multiple of trainer.micro_batch_size={m} x {w} ranks; "
                f"take {' or '.join(map(str, nearest))}"
            )
        if self.num_samples < g:
            largest = self.num_samples // (m * w) * m * w
            advice = (
                f"take trainer.global_batch_size={largest} or smaller"
                if largest
                else f"take a smaller trainer.micro_batch_size ({m}) or fewer ranks ({w}), and their product or a multiple "
                "that fits as trainer.global_batch_size"
            )
            raise ValueError(
                f"the training set has {self.num_samples} images, fewer than one step's trainer.global_batch_size={g}; {advice}"
            )
        if self.repeats < 1 or g % self.repeats:
            raise ValueError(
                f"data.repeated_augmentation={self.repeats} does not divide trainer.global_batch_size={g}; "
                "take 1 to turn it off"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The last partial global batch is dropped, on all ranks alike."""
        return self.num_samples // self.global_batch_size

    @property
    def samples_per_rank(self) -> int:
        """Of a whole epoch."""
        return self.steps_per_epoch * self.global_batch_size // self.world_size

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Sample of each position of the epoch over all ranks, (steps_per_epoch * global_batch_size,) int64."""
        images = epoch_order(self.num_samples, seed, epoch)
        steps, distinct = self.steps_per_epoch, self.global_batch_size // self.repeats
        images = images[: steps * distinct].reshape(steps, 1, distinct)
        copies = np.arange(self.repeats, dtype=np.int64).reshape(1, -1, 1) * self.num_samples
        return (images + copies).reshape(-1)

    def rank_order(self, seed: int, epoch: int, first_step: int = 0) -> np.ndarray:
        """This rank's samples from `first_step` on, micro-batch after micro-batch, flat int64."""
        per_rank = self.global_batch_size // self.world_size
        steps = self.order(seed, epoch).reshape(self.steps_per_epoch, self.world_size, per_rank)
        return np.ascontiguousarray(steps[first_step:, self.rank].reshape(-1))


def eval_indices(num_samples: int, rank: int, world_size: int) -> np.ndarray:
    """This rank's share of an evaluation: every sample on exactly one rank, none padded or dropped, int64."""
    return np.arange(rank, num_samples, world_size, dtype=np.int64)


def resolution_at(epoch: int, image_size: int, progressive: tuple[int, ...] = ()) -> int:
    """Image side in px of an epoch: `image_size`, or on the ramp (start_px, end_px, ramp_start_epoch, ramp_end_epoch).

    On the ramp sizes grow linearly and are rounded to multiples of 32 px, which is what the model's stride divides.
    """
    if not progressive:
        return image_size
    if len(progressive) != 4 or progressive[3] < progressive[2]:
        raise ValueError(
            f"data.progressive_resolution={list(progressive)} has to be [start_px, end_px, first_epoch, last_epoch], "
            "for instance [160,224,0,250]; [] turns it off"
        )
    start, end, first, last = progressive
    if epoch <= first:
        return start
    if epoch >= last:
        return end
    size = start + (end - start) * (epoch - first) / (last - first)
    return int(np.clip(round(size / 32) * 32, min(start, end), max(start, end)))
