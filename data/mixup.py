"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), one choice for a whole micro-batch, keyed by the step.

timm's Mixup in its batch mode: sample i is mixed with sample B - 1 - i. The parameters are drawn on the host, so that
a step on CUDA waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data import keyed_random
from data.keyed_random import Draws


@dataclass(frozen=True)
class MixParameters:
    """lam is the weight of the image itself; box (top, bottom, left, right) in px for CutMix, None for mixup."""

    lam: float
    box: tuple[int, int, int, int] | None


def draw_mix(
    key: int, *, mixup: float, cutmix: float, switch_prob: float, height: int, width: int
) -> MixParameters | None:
    """The parameters of one micro-batch from its step key; None where both are off."""
    if mixup <= 0.0 and cutmix <= 0.0:
        return None
    draws = Draws(key, keyed_random.MIX)
    use_cutmix = cutmix > 0.0 and (mixup <= 0.0 or draws.uniform(0) < switch_prob)
    lam = keyed_random.beta(Draws(key, keyed_random.MIX_LAMBDA), cutmix if use_cutmix else mixup)
    if not use_cutmix:
        return MixParameters(lam, None)
    side = (1.0 - lam) ** 0.5
    cut_h, cut_w = int(height * side), int(width * side)
    y, x = draws.below(1, height), draws.below(2, width)
    top, bottom = max(y - cut_h // 2, 0), min(y + (cut_h + 1) // 2, height)
    left, right = max(x - cut_w // 2, 0), min(x + (cut_w + 1) // 2, width)
    # The border may cut the box: lambda is the share that is really kept.
    return MixParameters(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images: Tensor, parameters: MixParameters | None) -> Tensor:
    """Mix float images (B, C, H, W) in place with the batch in reverse."""
    if parameters is None or parameters.lam == 1.0:
        return images
    if parameters.box is None:
        reverse = images.flip(0).mul_(1.0 - parameters.lam)
        return images.mul_(parameters.lam).add_(reverse)
    top, bottom, left, right = parameters.box
    images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    return images


def soft_targets(targets: Tensor, num_classes: int, smoothing: float, parameters: MixParameters | None) -> Tensor:
    """(B,) class numbers -> (B, num_classes) float32: smoothed one-hot rows, mixed like the images."""
    off = smoothing / num_classes
    rows = torch.full((len(targets), num_classes), off, device=targets.device)
    rows.scatter_(1, targets[:, None], 1.0 - smoothing + off)
    if parameters is None or parameters.lam == 1.0:
        return rows
    return rows * parameters.lam + rows.flip(0) * (1.0 - parameters.lam)
