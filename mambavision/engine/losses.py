"""The training loss: cross-entropy against soft targets, and MESA's distillation from the EMA model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.config import MesaConfig


def training_loss(
    logits: Tensor, targets: Tensor, images: Tensor, mesa: MesaConfig, ema: nn.Module | None, *, accum_steps: int
) -> tuple[Tensor, Tensor | None]:
    """A micro-batch's share of the step's loss, and how much of that is MESA's.

    ema: the moving average, where MESA is on; else None, and so is the second.
    """
    cross_entropy = soft_target_cross_entropy(logits, targets)
    if ema is None:
        return cross_entropy / accum_steps, None
    with torch.no_grad():
        ema_logits = ema(images)
    distillation = mesa.weight * mesa_loss(logits, ema_logits, mesa.temperature)
    return (cross_entropy + distillation) / accum_steps, distillation / accum_steps


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_c t_c log softmax(logits)_c; logits and targets (B, classes), computed in float32."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def mesa_loss(logits: Tensor, ema_logits: Tensor, temperature: float = 3.0) -> Tensor:
    """50 * KL(softmax(ema / T) || softmax(logits / T)), mean over the batch and without a T^2 factor, as published.

    Source: Du et al. 2022, "Sharpness-Aware Training for Free" (MESA), with the published constants.
    """
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(ema_logits.float() / temperature, dim=-1)
    return 50.0 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
