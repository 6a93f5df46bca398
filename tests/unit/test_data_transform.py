"""Normalising, erasing, mixing: on the device, keyed, equal to timm where timm defines it."""

import math

import numpy as np
import pytest
import torch
from timm.data.mixup import FastCollateMixup, Mixup, mixup_target

from data import keyed_random
from data.batch import Batch
from data.batch_transform import ERASING_LOG_RATIO, BatchTransform, erase, erasing_rectangles, inside
from data.keyed_random import Draws
from data.mixup import MixParameters, draw_mix, mix_images, soft_targets
from data.native_library import NativeUnavailable, load_library, loaded_library
from mambavision.config import AugmentConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch(count: int = 8, size: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return Batch(images.permute(0, 3, 1, 2), torch.arange(count) % 5, torch.arange(count) + 100)


def transform(**config) -> BatchTransform:
    return BatchTransform(AugmentConfig(**config), MEAN, STD, num_classes=5, seed=3)


def test_normalising_is_exact_and_channels_last():
    images = transform().normalise(batch().images)
    expected = (batch().images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


def test_the_same_step_gives_the_same_batch_and_another_step_another():
    one, again, other = transform()(batch(), 0, 5, 1), transform()(batch(), 0, 5, 1), transform()(batch(), 0, 5, 2)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_targets_sum_to_one_and_are_smoothed():
    _, targets = transform(mixup=0.0, cutmix=0.0, label_smoothing=0.1)(batch(), 0, 0, 0)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert targets[2, 2].item() == pytest.approx(0.92) and targets[2, 0].item() == pytest.approx(0.02)


def test_mixing_stops_at_its_epoch():
    never_mixed = transform(mixup=0.0, cutmix=0.0)(batch(), 9, 0, 0)
    for epoch, mixes in ((8, True), (9, False), (10, False)):
        images, targets = transform(mixup_off_epoch=9)(batch(), epoch, 0, 0)
        assert torch.equal(targets, never_mixed[1]) != mixes
        if epoch == 9:
            assert torch.equal(images, never_mixed[0])


def erased_by_the_table(index: int, seed: int, epoch: int, prob: float, side: int) -> tuple[int, int, int, int]:
    draws = Draws(keyed_random.sample_key(seed, epoch, index), keyed_random.ERASING)
    if draws.uniform(0) >= prob:
        return (0, 0, 0, 0)
    for t in range(10):
        area = draws.range(1 + 4 * t, 0.02, 1 / 3) * side * side
        ratio = math.exp(draws.range(2 + 4 * t, *ERASING_LOG_RATIO))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < side and w < side:
            top, left = draws.below(3 + 4 * t, side - h + 1), draws.below(4 + 4 * t, side - w + 1)
            return (top, top + h, left, left + w)
    return (0, 0, 0, 0)


def test_erased_rectangles_are_the_tables_draws():
    rectangles = erasing_rectangles(torch.arange(400), 3, 7, 0.25, 56, 56)
    assert rectangles.tolist() == [list(erased_by_the_table(i, 3, 7, 0.25, 56)) for i in range(400)]
    assert 0.15 < (rectangles[:, 1] > 0).double().mean() < 0.35


def test_erasing_touches_its_rectangle_alone_and_leaves_noise():
    images = torch.zeros(2, 3, 40, 40).to(memory_format=torch.channels_last)
    erase(images, torch.tensor([[5, 35, 8, 38], [0, 0, 0, 0]]), torch.Generator().manual_seed(0))
    inside = images[0, :, 5:35, 8:38].clone()
    images[0, :, 5:35, 8:38] = 0
    assert not images.any()
    assert abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.1


def test_the_path_without_waiting_erases_the_same_pixels():
    rectangles = erasing_rectangles(torch.arange(30), 0, 0, 0.5, 40, 36)
    mask = inside(rectangles, 40, 36)
    assert mask.shape == (30, 1, 40, 36)
    for row, (top, bottom, left, right) in zip(mask[:, 0], rectangles.tolist()):
        expected = torch.zeros(40, 36, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(row, expected)


def mix_key(kind: str) -> int:
    """A step key whose draw is mixup or CutMix."""
    for step in range(100):
        key = keyed_random.step_key(0, step, 0)
        parameters = draw_mix(key, mixup=0.8, cutmix=1.0, switch_prob=0.5, height=24, width=24)
        if (parameters.box is not None) == (kind == "cutmix"):
            return key
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_equals_timms_with_the_same_parameters(kind, monkeypatch):
    parameters = draw_mix(mix_key(kind), mixup=0.8, cutmix=1.0, switch_prob=0.5, height=24, width=24)
    images, targets = transform().normalise(batch().images), batch().targets
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)
    monkeypatch.setattr(
        theirs, "_params_per_batch", lambda: (parameters.lam if kind == "mixup" else 0.5, kind == "cutmix")
    )
    box = parameters.box or (0, 0, 0, 0)
    yl, yh, xl, xh = box
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: ((yl, yh, xl, xh), parameters.lam))
    expected_images, expected_targets = theirs(images.clone(), targets)
    torch.testing.assert_close(mix_images(images.clone(), parameters), expected_images, rtol=0, atol=0)
    torch.testing.assert_close(soft_targets(targets, 5, 0.1, parameters), expected_targets)
    torch.testing.assert_close(soft_targets(targets, 5, 0.1, parameters), mixup_target(targets, 5, parameters.lam, 0.1))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_erasing_comes_after_mixing_as_in_timms_prefetching_loader(kind, monkeypatch):
    """It collates mixed uint8 images, then normalises, then erases: noise is never mixed, nor covered by a CutMix box."""
    step = next(s for s in range(100) if (drawn(s).box is not None) == (kind == "cutmix"))
    parameters = drawn(step)
    theirs = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (parameters.lam, kind == "cutmix"))
    yl, yh, xl, xh = parameters.box or (0, 0, 0, 0)
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: ((yl, yh, xl, xh), parameters.lam))
    given = batch()
    mixed, targets = theirs([(image.numpy(), int(target)) for image, target in zip(given.images, given.targets)])
    expected = mixed.float().sub_(255 * torch.tensor(MEAN).view(3, 1, 1)).div_(255 * torch.tensor(STD).view(3, 1, 1))
    rectangles = erasing_rectangles(given.indices, 3, 0, 1.0, 24, 24)
    noise = torch.Generator().manual_seed(
        Draws(keyed_random.step_key(3, step, 0), keyed_random.ERASING_NOISE).bits(0) >> 1
    )
    images, our_targets = transform(erasing_prob=1.0)(given, 0, step, 0)
    # They round mixed pixels to whole grey levels, which is half a level at most.
    torch.testing.assert_close(images, erase(expected, rectangles, noise), rtol=0, atol=0.51 / 255 / min(STD))
    torch.testing.assert_close(our_targets, targets)


def drawn(step: int) -> MixParameters:
    """What the transform of these tests draws for the first micro-batch of a step."""
    return draw_mix(keyed_random.step_key(3, step, 0), mixup=0.8, cutmix=1.0, switch_prob=0.5, height=24, width=24)


def test_lambda_of_cutmix_is_the_share_kept():
    for step in range(50):
        key = keyed_random.step_key(1, step, 0)
        parameters = draw_mix(key, mixup=0.0, cutmix=1.0, switch_prob=0.5, height=20, width=30)
        top, bottom, left, right = parameters.box
        assert 0 <= top <= bottom <= 20 and 0 <= left <= right <= 30
        assert parameters.lam == pytest.approx(1 - (bottom - top) * (right - left) / 600)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_lambda_is_beta_distributed(alpha):
    """Kolmogorov-Smirnov against numpy's Beta, 1 % level."""
    ours = np.sort(
        [keyed_random.beta(Draws(keyed_random.step_key(0, s, 0), keyed_random.MIX_LAMBDA), alpha) for s in range(1500)]
    )
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 40_000))
    distance = np.abs(np.searchsorted(theirs, ours) / len(theirs) - (np.arange(1500) + 0.5) / 1500).max()
    assert distance < 1.63 * math.sqrt(1 / 1500 + 1 / 40_000)


def test_the_native_library_normalises_to_the_same_bits():
    try:
        load_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    assert loaded_library() is not None
    for size in (1, 5, 24, 37):  # whole blocks of pixels, and what is left over
        images = batch(3, size).images
        mean, std = (torch.tensor([255.0 * v for v in values]).view(1, 3, 1, 1) for values in (MEAN, STD))
        normalised = transform().normalise(images)
        assert torch.equal(normalised, images.float().sub_(mean).div_(std))
        assert normalised.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(transform().normalise(images.contiguous()), normalised), "another layout, by torch"
