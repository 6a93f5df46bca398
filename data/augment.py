"""What is done to a training image: crop box, flip, operations, drawn from its sample's key. No pixel is touched here.

Draw numbers are those of keyed_random's table. Semantics follow timm's RandAugment and 3-Augment, torchvision's
RandomResizedCrop, TrivialAugmentWide and ColorJitter; the native decoder (data/native/) repeats this file in C++.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from data import keyed_random
from data.keyed_random import Draws
from mambavision.config import AugmentConfig

NEAREST, BILINEAR, BICUBIC = 0, 1, 2
MAX_LEVEL = 10.0  # RandAugment's magnitudes are tenths of an operation's full range
TRANSLATE_SHARE = 0.45  # of the image side at full magnitude
TRIVIAL_BINS = 31
AFFINE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")

# In the order in which the draws count them.
RAND_AUGMENT_OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
TRIVIAL_OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
JITTER_OPERATIONS = ("brightness", "contrast", "color")
JITTER_ORDERS = tuple(itertools.permutations(range(3)))


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


class Operation(NamedTuple):
    """One step on a uint8 image. `argument` is in degrees, px, bits or grey levels, or a factor."""

    name: str
    argument: float = 0.0
    resample: int = NEAREST  # of the affine operations


@dataclass(frozen=True)
class RandAugment:
    """timm's `rand-m9-n2-p0.5-mstd0.5-mmax10-inc1`, parsed."""

    magnitude: float = 10.0
    num_layers: int = 2
    prob: float = 0.5
    magnitude_std: float = 0.0  # above 100: the magnitude is uniform in [0, magnitude]
    magnitude_max: float = MAX_LEVEL
    increasing: bool = False  # every operation gets stronger with the magnitude


@dataclass(frozen=True)
class AugmentPlan:
    """The per-sample half of an AugmentConfig, checked and parsed. Mixing and erasing are in batch_transform."""

    image_size: int
    seed: int
    config: AugmentConfig
    policy: RandAugment | str | None  # a RandAugment, "trivial", "three" or nothing
    jitter: float
    fill: tuple[int, int, int]  # what RandAugment's affine operations uncover, RGB

    @classmethod
    def create(cls, config: AugmentConfig, *, image_size: int, seed: int, mean: tuple[float, ...]) -> AugmentPlan:
        policy = parse_policy(config.auto_augment)
        # As in timm: RandAugment and TrivialAugment replace the jitter, 3-Augment goes with it.
        jitter = config.color_jitter if policy in (None, "three") else 0.0
        fill = tuple(min(255, round(255 * value)) for value in mean)
        return cls(image_size=image_size, seed=seed, config=config, policy=policy, jitter=jitter, fill=fill)

    def box(self, key: int, height: int, width: int) -> Box:
        """The part of the stored image that becomes the sample (the whole of it without random_crop)."""
        if not self.config.random_crop:
            return Box(0, 0, height, width)
        return random_resized_box(key, height, width, scale=self.config.crop_scale, ratio=self.config.crop_ratio)

    def interpolation(self, key: int) -> int:
        if self.config.interpolation == "random":
            return (BILINEAR, BICUBIC)[Draws(key, keyed_random.INTERPOLATION).below(0, 2)]
        return BICUBIC if self.config.interpolation == "bicubic" else BILINEAR

    def pad_offset(self, key: int) -> tuple[int, int]:
        """(top, left) of the window of image_size in the image padded by pad_crop px on each side."""
        if self.config.random_crop or not self.config.pad_crop:
            return self.config.pad_crop, self.config.pad_crop
        draws = Draws(key, keyed_random.PAD_CROP)
        return draws.below(0, 2 * self.config.pad_crop + 1), draws.below(1, 2 * self.config.pad_crop + 1)

    def flips(self, key: int) -> bool:
        return Draws(key, keyed_random.FLIP).uniform(0) < self.config.hflip

    def operations(self, key: int) -> list[Operation]:
        if isinstance(self.policy, RandAugment):
            return rand_augment_operations(key, self.policy, self.image_size, self.config.interpolation)
        operations = []
        if self.policy == "trivial":
            operations.append(trivial_operation(key))
        elif self.policy == "three":
            operations.append(three_operation(key))
        return operations + jitter_operations(key, self.jitter)


def parse_policy(text: str) -> RandAugment | str | None:
    """`rand-...` in timm's notation, `trivial`, `three` or `none`. Raises ValueError for anything else."""
    if text in ("none", "", None):
        return None
    if text in ("trivial", "three"):
        return text
    sections = text.split("-")
    if sections[0] != "rand":
        raise ValueError(f"augment.auto_augment={text} is not known; take rand-m9-mstd0.5-inc1, trivial, three or none")
    fields = {"m": "magnitude", "n": "num_layers", "p": "prob", "mstd": "magnitude_std", "mmax": "magnitude_max"}
    values: dict[str, float | int | bool] = {}
    for section in sections[1:]:
        name = section.rstrip("0123456789.")
        try:
            number = float(section[len(name) :])
        except ValueError:
            number = None
        if number is None or name not in (*fields, "inc"):
            raise ValueError(
                f"augment.auto_augment={text}: section {section!r} is not known; "
                "sections are m, n, p, mstd, mmax and inc, each with its number, as in rand-m9-n2-mstd0.5-inc1"
            )
        if name == "inc":
            values["increasing"] = bool(number)
        else:
            values[fields[name]] = int(number) if name == "n" else number
    return RandAugment(**values)


def random_resized_box(
    key: int, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """torchvision's RandomResizedCrop.get_params: ten tries, then the central crop of clamped aspect ratio."""
    draws = Draws(key, keyed_random.CROP)
    area = height * width
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for t in range(10):
        target_area = area * draws.range(4 * t, *scale)
        aspect_ratio = math.exp(draws.range(4 * t + 1, *log_ratio))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(draws.below(4 * t + 2, height - h + 1), draws.below(4 * t + 3, width - w + 1), h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    h, w = max(1, min(h, height)), max(1, min(w, width))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def rand_augment_operations(key: int, policy: RandAugment, image_size: int, interpolation: str) -> list[Operation]:
    draws = Draws(key, keyed_random.RAND_AUGMENT)
    operations = []
    for layer in range(policy.num_layers):
        n = 8 * layer
        name = RAND_AUGMENT_OPERATIONS[draws.below(n, len(RAND_AUGMENT_OPERATIONS))]
        if draws.uniform(n + 1) >= policy.prob:
            continue
        level = policy.magnitude
        if policy.magnitude_std > 100.0:
            level = draws.range(n + 2, 0.0, level)
        elif policy.magnitude_std > 0.0:
            level = level + policy.magnitude_std * draws.gauss(n + 2)
        level = max(0.0, min(level, policy.magnitude_max)) / MAX_LEVEL
        sign = -1.0 if draws.uniform(n + 4) < 0.5 else 1.0
        argument = _argument(name, level, sign, image_size, policy.increasing)
        resample = NEAREST
        if name in AFFINE:
            either = (BILINEAR, BICUBIC)[draws.below(n + 5, 2)]
            resample = {"random": either, "bilinear": BILINEAR, "bicubic": BICUBIC}[interpolation]
        operations.append(Operation(name, argument, resample))
    return operations


def _argument(name: str, level: float, sign: float, image_size: int, increasing: bool) -> float:
    """An operation's argument at `level` in [0, 1] (above 1 with mmax over 10), as in timm's LEVEL_TO_ARG."""
    if name == "rotate":
        return sign * (level * 30.0)
    if name in ("shear_x", "shear_y"):
        return sign * (level * 0.3)
    if name in ("translate_x", "translate_y"):
        return sign * (level * TRANSLATE_SHARE) * image_size
    if name == "posterize":
        bits = int(level * 4.0)
        return float(4 - bits if increasing else bits)
    if name == "solarize":
        threshold = min(256, int(level * 256.0))
        return float(256 - threshold if increasing else threshold)
    if name == "solarize_add":
        return float(min(128, int(level * 110.0)))
    if name in ("color", "contrast", "brightness", "sharpness"):
        return max(0.1, 1.0 + sign * (level * 0.9)) if increasing else level * 1.8 + 0.1
    return 0.0  # autocontrast, equalize, invert


def trivial_operation(key: int) -> Operation:
    """TrivialAugment (Mueller and Hutter 2021) as in torchvision's TrivialAugmentWide: nearest, black fill."""
    draws = Draws(key, keyed_random.TRIVIAL)
    name = TRIVIAL_OPERATIONS[draws.below(0, len(TRIVIAL_OPERATIONS))]
    share = draws.below(1, TRIVIAL_BINS) / (TRIVIAL_BINS - 1)
    sign = -1.0 if draws.below(2, 2) else 1.0
    if name in ("shear_x", "shear_y"):
        return Operation(name, sign * (share * 0.99))
    if name in ("translate_x", "translate_y"):
        return Operation(name, -sign * math.floor(share * 32.0))
    if name == "rotate":
        return Operation(name, sign * (share * 135.0))
    if name in ("brightness", "color", "contrast", "sharpness"):
        return Operation(name, 1.0 + sign * (share * 0.99))
    if name == "posterize":
        return Operation(name, 8.0 - round(share * 6.0))
    if name == "solarize":
        return Operation(name, 255.0 - share * 255.0)
    return Operation(name)


def three_operation(key: int) -> Operation:
    """3-Augment (Touvron et al. 2022, DeiT III): one of solarize, grayscale, Gaussian blur."""
    draws = Draws(key, keyed_random.THREE)
    choice = draws.below(0, 3)
    if choice == 0:
        return Operation("solarize", 128.0)
    return Operation("color", 0.0) if choice == 1 else Operation("gaussian_blur", draws.range(1, 0.1, 2.0))


def jitter_operations(key: int, strength: float) -> list[Operation]:
    """torchvision's ColorJitter(strength, strength, strength): the three in random order."""
    if strength <= 0.0:
        return []
    draws = Draws(key, keyed_random.JITTER)
    factors = [draws.range(n, max(0.0, 1.0 - strength), 1.0 + strength) for n in range(3)]
    return [Operation(JITTER_OPERATIONS[which], factors[which]) for which in JITTER_ORDERS[draws.below(3, 6)]]
