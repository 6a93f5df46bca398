"""From a uint8 batch to what the model is trained on: normalise, mixup or CutMix, random erasing, soft targets.

Runs on the device that holds the batch, after the copy, and never waits for it. Random choices are keyed: the erased
rectangle by (seed, epoch, sample), its noise and the mixing by (seed, step, micro-batch). Rectangles and mixing are
equal on every device; the noise comes from the device's own generator, so CPU and CUDA differ there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data import keyed_random
from data.batch import Batch
from data.keyed_random import Draws
from data.mixup import draw_mix, mix_images, soft_targets
from data.native_library import loaded_library
from mambavision.config import AugmentConfig

ERASING_AREA = (0.02, 1 / 3)  # share of the image, as in timm
ERASING_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
ERASING_TRIES = 10


class BatchTransform:
    def __init__(
        self,
        augment: AugmentConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        num_classes: int,
        *,
        seed: int,
    ):
        self.augment = augment
        self.mean = mean
        self.std = std
        self.num_classes = num_classes
        self.seed = seed
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: Batch, epoch: int, step: int, micro_index: int) -> tuple[Tensor, Tensor]:
        """Training: float images (B, 3, H, W) in channels_last and soft targets (B, num_classes).

        `step` counts from the start of the run, `micro_index` the micro-batches of the step over all ranks.
        """
        augment = self.augment
        key = keyed_random.step_key(self.seed, step, micro_index)
        images = self.normalise(batch.images)
        mixing = not augment.mixup_off_epoch or epoch < augment.mixup_off_epoch
        parameters = draw_mix(
            key,
            mixup=augment.mixup if mixing else 0.0,
            cutmix=augment.cutmix if mixing else 0.0,
            switch_prob=augment.mixup_switch_prob,
            height=images.shape[2],
            width=images.shape[3],
        )
        images = mix_images(images, parameters)
        if augment.erasing_prob > 0.0:
            # After the mixing, as in timm's prefetching loader, with which the models were published: a quarter of the
            # mixed images has a rectangle of full noise, instead of nearly half of them one of noise blended in.
            generator = torch.Generator(device=images.device)
            generator.manual_seed(Draws(key, keyed_random.ERASING_NOISE).bits(0) >> 1)
            rectangles = erasing_rectangles(
                batch.indices, self.seed, epoch, augment.erasing_prob, images.shape[2], images.shape[3]
            )
            images = erase(images, _without_waiting(rectangles, images.device), generator)
        targets = soft_targets(batch.targets, self.num_classes, augment.label_smoothing, parameters)
        return images, targets

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> normalised float32 in channels_last, nothing random."""
        if images.device not in self._statistics:
            self._statistics[images.device] = tuple(
                torch.tensor([255.0 * v for v in values], device=images.device).view(1, -1, 1, 1)
                for values in (self.mean, self.std)
            )
        mean, std = self._statistics[images.device]
        library = loaded_library() if images.device.type == "cpu" else None
        if library and images.shape[1] == 3 and images.is_contiguous(memory_format=torch.channels_last):
            out = torch.empty_like(images, dtype=torch.float32)  # keeps channels_last
            pixels = images.numel() // 3
            library.loader_normalize(images.data_ptr(), out.data_ptr(), pixels, mean.data_ptr(), std.data_ptr())
            return out
        return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def erasing_rectangles(indices: Tensor, seed: int, epoch: int, prob: float, height: int, width: int) -> Tensor:
    """The erased rectangle of each sample, (B, 4) int64 rows (top, bottom, left, right), all zero where none is erased.

    The draws of keyed_random's ERASING for a whole batch at once, where `indices` (B,) are: on the host, as a hundred
    operations on so few numbers take a GPU longer to be told of.
    """
    key = keyed_random.domain_key(seed, keyed_random.SAMPLE, epoch)
    sample_keys = _fold(torch.full_like(indices, _signed(key)), indices)
    keys = _fold(sample_keys, torch.full_like(indices, keyed_random.ERASING))
    tries = torch.arange(ERASING_TRIES, device=indices.device)
    bits = _fold(keys[:, None], torch.arange(1 + 4 * ERASING_TRIES, device=indices.device)[None])  # (B, draws)
    area, ratio = (_uniform(bits[:, offset + 4 * tries]) for offset in (1, 2))  # (B, tries)
    target_area = (ERASING_AREA[0] + (ERASING_AREA[1] - ERASING_AREA[0]) * area) * (height * width)
    ratio = torch.exp(ERASING_LOG_RATIO[0] + (ERASING_LOG_RATIO[1] - ERASING_LOG_RATIO[0]) * ratio)
    h = torch.round(torch.sqrt(target_area * ratio)).long()
    w = torch.round(torch.sqrt(target_area / ratio)).long()
    fits = (h < height) & (w < width)
    top = _below(bits[:, 3 + 4 * tries], height - h + 1)
    left = _below(bits[:, 4 + 4 * tries], width - w + 1)
    first = torch.argmax(fits.to(torch.uint8), dim=1, keepdim=True)
    erased = (_uniform(bits[:, :1]) < prob) & fits.any(dim=1, keepdim=True)
    rectangles = torch.stack([top, top + h, left, left + w], dim=2)  # (B, tries, 4)
    return rectangles.gather(1, first[:, :, None].expand(-1, -1, 4))[:, 0] * erased


def erase(images: Tensor, rectangles: Tensor, generator: torch.Generator) -> Tensor:
    """Replace rectangles (B, 4) of normalised images (B, C, H, W) by standard normal noise, in place."""
    if images.device.type == "cpu":
        # Noise for the erased pixels alone: on a CPU a whole batch of it would cost more than everything else here.
        for image, (top, bottom, left, right) in zip(images, rectangles.tolist()):
            if bottom > top:
                image[:, top:bottom, left:right] = torch.randn(
                    (image.shape[0], bottom - top, right - left), generator=generator
                )
        return images
    noise = torch.empty_like(images).normal_(generator=generator)  # keeps channels_last
    return torch.where(inside(rectangles, images.shape[2], images.shape[3]), noise, images)


def inside(rectangles: Tensor, height: int, width: int) -> Tensor:
    """Where the rectangles (B, 4) lie, (B, 1, H, W) bool, without looking at their values on the host."""
    rows = torch.arange(height, device=rectangles.device)
    columns = torch.arange(width, device=rectangles.device)
    top, bottom, left, right = (edge[:, None] for edge in rectangles.unbind(1))
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def _without_waiting(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch knows."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift right of int64 bit patterns."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _fold(key: Tensor, value: Tensor) -> Tensor:
    """keyed_random.fold on int64 bit patterns; int64 products wrap modulo 2**64."""
    z = key + _signed(keyed_random.GAMMA) * (value + 1)
    z = (z ^ _shift(z, 30)) * _signed(keyed_random.MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(keyed_random.MIX_2)
    return z ^ _shift(z, 31)


def _uniform(bits: Tensor) -> Tensor:
    return _shift(bits, 11).to(torch.float64) * 2.0**-53


def _below(bits: Tensor, count: Tensor) -> Tensor:
    return _shift(_shift(bits, 32) * count, 32)
