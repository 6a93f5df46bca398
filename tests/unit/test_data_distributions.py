"""20 000 keyed draws against torchvision's and timm's own, two-sample tests at the 0.1 % level."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.autoaugment import TrivialAugmentWide

from data import augment, keyed_random
from data.augment import AugmentPlan
from data.batch_transform import erasing_rectangles
from mambavision.config import AugmentConfig
from tests.unit.data_samples import smooth_image
from tests.unit.test_data_augment import TIMM_NAMES

pytestmark = pytest.mark.slow
DRAWS = 20_000
KEYS = [keyed_random.sample_key(0, 0, index) for index in range(DRAWS)]
MEAN = (0.485, 0.456, 0.406)


def assert_same_distribution(ours, theirs):
    """Kolmogorov-Smirnov, exact for continuous values and conservative where values repeat."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    values = np.concatenate([ours, theirs])
    below = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (ours, theirs)]
    assert np.abs(below[0] - below[1]).max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))


def assert_same_frequencies(ours: Counter, theirs: Counter):
    """Chi-squared of a two-row table, by its normal approximation (Wilson and Hilferty 1931)."""
    kinds = sorted(set(ours) | set(theirs))
    table = np.array([[counts[kind] for kind in kinds] for counts in (ours, theirs)], dtype=float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi2, freedom = ((table - expected) ** 2 / expected).sum(), len(kinds) - 1
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.09, dict(zip(kinds, table.T.tolist()))


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120), (64, 64)])
def test_crop_area_ratio_and_place_are_torchvisions(height, width):
    torch.manual_seed(0)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)], dtype=float)
    ours = np.array([augment.random_resized_box(k, height, width, scale=scale, ratio=ratio) for k in KEYS], dtype=float)
    for value in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert_same_distribution(value(ours), value(theirs))


def test_rand_augment_draws_timms_operations_and_magnitudes():
    random.seed(0)
    np.random.seed(0)
    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", dict(translate_const=100, img_mean=(124, 116, 104)))
    recorded: list[tuple[str, float, int]] = []
    for operation in policy.ops:

        def record(image, *arguments, name=operation.name, **options):
            resample = options["resample"]
            recorded.append((name, arguments[0] if arguments else 0.0, random.choice(resample)))
            return image

        operation.aug_fn = record
    image, theirs_per_image = smooth_image(0, 8, 8), []
    for _ in range(DRAWS):
        before = len(recorded)
        policy(image)
        theirs_per_image.append(len(recorded) - before)
    plan = AugmentPlan.create(AugmentConfig(), image_size=224, seed=0, mean=MEAN)
    ours = [plan.operations(key) for key in KEYS]
    assert_same_frequencies(Counter(len(operations) for operations in ours), Counter(theirs_per_image))
    flat = [operation for operations in ours for operation in operations]
    assert_same_frequencies(Counter(TIMM_NAMES[op.name] for op in flat), Counter(name for name, *_ in recorded))
    for name in augment.RAND_AUGMENT_OPERATIONS:
        scale = 224 if name.startswith("translate") else 1
        theirs = [argument * scale for kind, argument, _ in recorded if kind == TIMM_NAMES[name]]
        assert_same_distribution([op.argument for op in flat if op.name == name], theirs)
    affine = [op.resample for op in flat if op.name in augment.AFFINE]
    assert_same_frequencies(Counter(affine), Counter({augment.BILINEAR: len(affine), augment.BICUBIC: len(affine)}))


def test_trivial_augment_draws_torchvisions_operations_and_magnitudes(monkeypatch):
    torch.manual_seed(0)
    theirs: list[tuple[str, float]] = []
    monkeypatch.setattr(
        "torchvision.transforms.autoaugment._apply_op",
        lambda image, name, magnitude, **_: theirs.append((name, magnitude)) or image,
    )
    policy, image = TrivialAugmentWide(), smooth_image(0, 8, 8)
    for _ in range(DRAWS):
        policy(image)
    ours = [augment.trivial_operation(key) for key in KEYS]
    plain = {name: name.title().replace("_", "") for name in augment.TRIVIAL_OPERATIONS} | {
        "autocontrast": "AutoContrast"
    }
    assert_same_frequencies(Counter(plain[op.name] for op in ours), Counter(name for name, _ in theirs))
    to_magnitude = {"translate_x": lambda v: -v, "translate_y": lambda v: -v} | {
        name: lambda v: v - 1.0 for name in ("brightness", "color", "contrast", "sharpness")
    }
    for name in augment.TRIVIAL_OPERATIONS:
        magnitudes = [to_magnitude.get(name, lambda v: v)(op.argument) for op in ours if op.name == name]
        expected = [int(m) if name.startswith("translate") else m for kind, m in theirs if kind == plain[name]]
        assert_same_distribution(np.round(magnitudes, 5), np.round(expected, 5))


def test_erasing_draws_timms_rectangles():
    random.seed(0)
    erasing = RandomErasing(0.25, mode="const", device="cpu")
    rows = []
    for _ in range(DRAWS):
        image = torch.ones(1, 32, 32)
        erasing._erase(image, 1, 32, 32, torch.float32)
        where = (image[0] == 0).nonzero()
        if len(where):
            (top, left), (bottom, right) = where.min(0).values.tolist(), (where.max(0).values + 1).tolist()
            rows.append((top, bottom, left, right))
    theirs = np.array(rows, dtype=float)
    ours = erasing_rectangles(torch.arange(DRAWS), 0, 0, 0.25, 32, 32).double().numpy()
    ours = ours[ours[:, 1] > ours[:, 0]]
    assert_same_frequencies(
        Counter({True: len(ours), False: DRAWS - len(ours)}), Counter({True: len(theirs), False: DRAWS - len(theirs)})
    )
    for value in (lambda r: r[:, 1] - r[:, 0], lambda r: r[:, 3] - r[:, 2], lambda r: r[:, 0], lambda r: r[:, 2]):
        assert_same_distribution(value(ours), value(theirs))


def test_flips_interpolations_and_jitter_are_fair():
    plan = AugmentPlan.create(AugmentConfig(), image_size=224, seed=0, mean=MEAN)
    for decisions in ([plan.flips(key) for key in KEYS], [plan.interpolation(key) == augment.BICUBIC for key in KEYS]):
        assert abs(np.mean(decisions) - 0.5) < 3.3 * 0.5 / math.sqrt(DRAWS)
    jitters = [augment.jitter_operations(key, 0.4) for key in KEYS]
    uniform = np.random.default_rng(0).uniform(0.6, 1.4, DRAWS)
    for name in augment.JITTER_OPERATIONS:
        assert_same_distribution([op.argument for ops in jitters for op in ops if op.name == name], uniform)
    orders = Counter(tuple(op.name for op in ops) for ops in jitters)
    assert len(orders) == 6
    assert_same_frequencies(orders, Counter({order: DRAWS // 6 for order in orders}))
