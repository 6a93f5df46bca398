"""The training loss: cross-entropy, or binary cross-entropy, against soft targets; MESA's distillation from the EMA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.config import MesaConfig


@dataclass(frozen=True)
class TrainingLoss:
    """A micro-batch's share of the step's loss. The fields are the settings of the same names below `trainer`."""

    loss: str
    bce_threshold: float | None
    mesa: MesaConfig
    accum_steps: int

    def __call__(
        self, logits: Tensor, targets: Tensor, images: Tensor, ema: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """(loss, MESA's part of it), each divided by accum_steps; the part is None while MESA is off.

        logits and soft targets: (B, classes); images: (B, 3, H, W); ema: the moving average, None while MESA is off.
        """
        if self.loss == "bce":
            return binary_cross_entropy(logits, targets, self.bce_threshold) / self.accum_steps, None
        cross_entropy = soft_target_cross_entropy(logits, targets)
        if ema is None:
            return cross_entropy / self.accum_steps, None
        with torch.no_grad():
            ema_logits = ema(images)
        distillation = self.mesa.weight * mesa_loss(logits, ema_logits, self.mesa.temperature)
        return (cross_entropy + distillation) / self.accum_steps, distillation / self.accum_steps


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_c t_c log softmax(logits)_c; logits and targets (B, classes), computed in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def binary_cross_entropy(logits: Tensor, targets: Tensor, threshold: float | None = None) -> Tensor:
    """Every class a yes-or-no question of its own; the mean over batch and classes, computed in float32.

    Source: Wightman et al. 2021, "ResNet strikes back", section 2.2. logits and soft targets: (B, classes). threshold:
    targets above it count as 1, the others as 0, so that both images of a mixture are wholly there.
    """
    if threshold is not None:
        targets = targets.gt(threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def blind_guess(loss: str, num_classes: int) -> float:
    """The loss of a model that answers every image alike, each of the classes being as frequent.

    bce: its best answer is 1 / num_classes for each class, whatever the smoothing and mixing, as the loss is linear in
    targets of sum 1. Thresholded targets of mixed images have another sum.
    """
    if loss == "cross_entropy" or num_classes == 1:
        return math.log(num_classes)
    share = 1 / num_classes
    return -share * math.log(share) - (1 - share) * math.log1p(-share)


def mesa_loss(logits: Tensor, ema_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """50 * KL(softmax(ema / T) || softmax(logits / T)), mean over the batch and without a T^2 factor, as published.

    Source: Du et al. 2022, "Sharpness-Aware Training for Free" (MESA), with the published constants.
    """
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(ema_logits.float() / temperature, dim=-1)
    return 50.0 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
