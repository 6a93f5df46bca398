"""The training loss: binary cross-entropy is timm's, and what a blind guess costs is known for both losses."""

from __future__ import annotations

import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy

from data.mixup import MixParameters, soft_targets
from mambavision.config import MesaConfig
from mambavision.engine.losses import TrainingLoss, binary_cross_entropy, blind_guess, soft_target_cross_entropy

CLASSES = 12
LOGITS = torch.linspace(-3, 4, 4 * CLASSES).sin().reshape(4, CLASSES) * 5
LABELS = torch.tensor([3, 0, 11, 3])
MIXED = soft_targets(LABELS, CLASSES, 0.1, MixParameters(0.7, None))


@pytest.mark.parametrize("threshold", [None, 0.2, 0.5])
def test_binary_cross_entropy_is_timms(threshold: float | None):
    theirs = BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold)
    for targets, given in ((MIXED, MIXED), (soft_targets(LABELS, CLASSES, 0.1, None), LABELS)):
        torch.testing.assert_close(binary_cross_entropy(LOGITS, targets, threshold), theirs(LOGITS, given))


def test_it_is_computed_in_float32_and_takes_its_share_of_the_accumulation():
    loss = TrainingLoss("bce", 0.2, MesaConfig(), accum_steps=4)
    share, mesa = loss(LOGITS.bfloat16(), MIXED, LOGITS, None)
    assert mesa is None and share.dtype == torch.float32
    assert share == binary_cross_entropy(LOGITS.bfloat16().float(), MIXED, 0.2) / 4


@pytest.mark.parametrize("classes", [2, 12, 1000])
def test_no_answer_that_is_the_same_for_all_images_costs_less_than_a_blind_guess(classes: int):
    """Of mixed and smoothed targets, each class as frequent."""
    targets = soft_targets(torch.arange(classes), classes, 0.1, MixParameters(0.6, None))
    for loss, best, function in (
        ("bce", -math.log(max(classes - 1, 1)), binary_cross_entropy),
        ("cross_entropy", 0.0, soft_target_cross_entropy),
    ):
        guess = blind_guess(loss, classes)
        costs = [float(function(torch.full((classes, classes), best + shift), targets)) for shift in (-0.3, 0.0, 0.3)]
        assert costs[1] == pytest.approx(guess, rel=1e-4)
        if loss == "bce":
            assert min(costs[0], costs[2]) > costs[1]


def test_of_one_class_there_is_nothing_to_guess():
    assert blind_guess("bce", 1) == blind_guess("cross_entropy", 1) == 0.0
