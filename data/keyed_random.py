"""Randomness as a function: every random decision of a sample is a hash of what it is for.

This file owns the generator and the list of draws. The native decoder (data/native/) repeats both bit for bit,
so that the same crop boxes, flips and operations come out whichever loader decodes the image, whatever the number of
threads, ranks and restarts. Change nothing here without changing it there: the tests compare the two.

The generator (all arithmetic modulo 2**64)

    mix(z)          z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z ^ z >> 31
    fold(key, v)    mix(key + 0x9E3779B97F4A7C15 * (v + 1))
    sample key      fold(fold(fold(fold(0, seed), SAMPLE), epoch), index)      index: see below
    step key        fold(fold(fold(fold(0, seed), STEP), step), micro_index)
    purpose key     fold(sample or step key, purpose)
    draw n          bits = fold(purpose key, n)                                64 bits, n counts from 0
    uniform n       (bits >> 11) * 2**-53                                      in [0, 1)
    range n (a, b)  a + (b - a) * uniform n
    below n (m)     ((bits >> 32) * m) >> 32                                   an integer in [0, m), m < 2**32
    gauss n         sqrt(-2 * log(1 - uniform n)) * cos(2 * pi * uniform n+1)  takes two draws

mix is splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
Floating-point steps are IEEE doubles in the order written (no fast-math, no fused multiply-add); `round` is to even.
`index` is the position in the data set; the r-th repetition of an image in an epoch (repeated augmentation) counts as
index + r * num_samples. A sample that replaces an unreadable one draws with the key of the sample that it replaces.

The draws. "try t" repeats up to ten times, t = 0..9; a draw that is not needed is skipped, never shifts the others.

    purpose            draw      meaning
    1 CROP             4t        area: range(scale) * height * width                  torchvision's RandomResizedCrop:
                       4t+1      ratio: exp(range(log ratio0, log ratio1))            w = round(sqrt(area * ratio)),
                       4t+2      top: below(height - h + 1)                           h = round(sqrt(area / ratio));
                       4t+3      left: below(width - w + 1)                           kept if it fits the image
                                 after ten tries: the central crop, ratio clamped to [ratio0, ratio1]
    2 INTERPOLATION    0         below(2): 0 bilinear, 1 bicubic; only for interpolation=random
    3 FLIP             0         uniform < hflip
    4 PAD_CROP         0, 1      top, left: below(2 * pad + 1) each
    5 RAND_AUGMENT     8l        layer l: operation: below(number of operations), with replacement
                       8l+1      applied if uniform < prob
                       8l+2,+3   magnitude: m + mstd * gauss, clipped to [0, mmax or 10]; mstd > 100: range(0, m)
                       8l+4      uniform < 0.5: the argument's sign is changed (signed operations only)
                       8l+5      0 bilinear, 1 bicubic: below(2); affine operations, only for interpolation=random
    6 TRIVIAL          0         operation: below(14)
                       1         magnitude bin: below(31)
                       2         below(2): 1 changes the argument's sign (signed operations only)
    7 THREE            0         operation: below(3): solarize at 128, grayscale, Gaussian blur
                       1         blur radius: range(0.1, 2.0)
    8 JITTER           0, 1, 2   brightness, contrast, saturation factor: range(max(0, 1 - s), 1 + s)
                       3         order: below(6), the permutations of (brightness, contrast, saturation), lexicographic
    9 ERASING          0         erased if uniform < erasing_prob
                       1+4t      area: range(0.02, 1/3) * height * width              timm's RandomErasing:
                       2+4t      ratio: exp(range(log 0.3, log 1/0.3))                h = round(sqrt(area * ratio)),
                       3+4t      top: below(height - h + 1)                           w = round(sqrt(area / ratio));
                       4+4t      left: below(width - w + 1)                           taken if w < width and h < height
    of a step key:
    16 MIX             0         cutmix if uniform < mixup_switch_prob (both alphas above 0)
                       1, 2      centre of the cutmix box, y: below(height), x: below(width)
    17 MIX_LAMBDA      0...      lambda ~ Beta(alpha, alpha), see `beta`
    18 ERASING_NOISE   0         seed of the device's noise generator
    19 DROP_PATH       -         its key is the seed of torch's generator, which drops paths
"""

from __future__ import annotations

import math

import numpy as np

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

# Domains: what a key is made of.
SAMPLE, STEP, ORDER = 1, 2, 3

# Purposes: what a draw decides.
CROP, INTERPOLATION, FLIP, PAD_CROP, RAND_AUGMENT, TRIVIAL, THREE, JITTER, ERASING = range(1, 10)
MIX, MIX_LAMBDA, ERASING_NOISE, DROP_PATH = 16, 17, 18, 19


def mix(z: int) -> int:
    """splitmix64's finaliser: a bijection of 64 bits whose outputs look independent."""
    z = ((z ^ (z >> 30)) * MIX_1) & MASK
    z = ((z ^ (z >> 27)) * MIX_2) & MASK
    return z ^ (z >> 31)


def fold(key: int, value: int) -> int:
    """The key that follows from `key` for `value` (any integer, taken modulo 2**64)."""
    return mix((key + GAMMA * (value + 1)) & MASK)


def domain_key(seed: int, domain: int, *values: int) -> int:
    key = fold(fold(0, seed), domain)
    for value in values:
        key = fold(key, value)
    return key


def sample_key(seed: int, epoch: int, index: int) -> int:
    return domain_key(seed, SAMPLE, epoch, index)


def step_key(seed: int, step: int, micro_index: int) -> int:
    return domain_key(seed, STEP, step, micro_index)


def fold_array(key: int, values: np.ndarray) -> np.ndarray:
    """`fold` for an array of values, uint64 in and out, bit for bit the same."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.uint64(GAMMA) * (values.astype(np.uint64) + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
        return z ^ (z >> np.uint64(31))


class Draws:
    """The numbered draws of one purpose of one key."""

    def __init__(self, key: int, purpose: int):
        self.key = fold(key, purpose)

    def bits(self, n: int) -> int:
        return fold(self.key, n)

    def uniform(self, n: int) -> float:
        return (self.bits(n) >> 11) * 2.0**-53

    def range(self, n: int, low: float, high: float) -> float:
        return low + (high - low) * self.uniform(n)

    def below(self, n: int, count: int) -> int:
        return ((self.bits(n) >> 32) * count) >> 32

    def gauss(self, n: int) -> float:
        """Standard normal from draws n and n + 1 (Box and Muller 1958)."""
        return math.sqrt(-2.0 * math.log(1.0 - self.uniform(n))) * math.cos(2.0 * math.pi * self.uniform(n + 1))


def beta(draws: Draws, alpha: float) -> float:
    """Beta(alpha, alpha) as x / (x + y) of two gamma variates, each from its own half of the draws."""
    x, y = (_gamma(Draws(draws.key, half), alpha) for half in (0, 1))
    return x / (x + y) if x + y > 0.0 else 0.5


def _gamma(draws: Draws, alpha: float) -> float:
    """Gamma(alpha, 1), alpha > 0 (Marsaglia and Tsang, A simple method for generating gamma variables, 2000)."""
    boost = 1.0
    if alpha < 1.0:
        boost = (1.0 - draws.uniform(0)) ** (1.0 / alpha)
        alpha += 1.0
    d = alpha - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    n = 1
    while True:
        x, u = draws.gauss(n), 1.0 - draws.uniform(n + 2)
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(u) < 0.5 * x * x + d - d * v + d * math.log(v):
            return boost * d * v
        n += 3
