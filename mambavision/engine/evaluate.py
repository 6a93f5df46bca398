"""Exact evaluation: every image counted once, at any world size and batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Batch
from data.variants import EvalSet
from mambavision.distributed import World, sum_over_ranks


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable,
    *,
    prepare: Callable[[Tensor], Tensor],
    autocast: Callable[[], torch.autocast],
    world: World,
    answered: Callable[[str, Tensor, Batch], None] | None = None,
) -> dict[str, float]:
    """Top-1, Top-5 (percent) and cross-entropy of each model over all ranks' `batches`, in one pass over the data.

    models: prefix -> model, for instance {"": model, "ema_": ema.module}; the keys returned are "<prefix>top1", ...
    prepare: uint8 images (B, 3, H, W) on the device -> what the models take.
    answered: given each model's prefix and logits (B, classes) for each batch, on the device.
    A loader with an `eval_set` has its answers counted by that set's rules (data/variants.py).
    """
    was_training = {prefix: model.training for prefix, model in models.items()}
    for model in models.values():
        model.eval()
    eval_set = getattr(batches, "eval_set", None) or EvalSet("val")  # how answers are counted: classes, groups, labels
    shape = (len(models), len(eval_set.groups), 3)
    counts = torch.zeros(shape, dtype=torch.float64, device=world.device)  # exact up to 2^53
    losses = torch.zeros(len(models), dtype=torch.float64, device=world.device)
    images_seen = 0
    start = time.perf_counter()
    for batch in batches:
        batch = batch.to(world.device)
        images = prepare(batch.images)
        for row, (prefix, model) in enumerate(models.items()):
            with autocast():
                logits = model(images)
            logits = logits.float()
            counts[row] += eval_set.count(logits, batch.targets, batch.indices)
            losses[row] += F.cross_entropy(logits, batch.targets, reduction="sum")
            if answered is not None:
                answered(prefix, logits, batch)
        images_seen += len(batch.targets)
    seen = torch.tensor([images_seen], dtype=torch.float64)
    totals = sum_over_ranks(torch.cat([counts.flatten().cpu(), losses.cpu(), seen]))
    seconds = time.perf_counter() - start
    for prefix, model in models.items():
        model.train(was_training[prefix])
    all_counts, all_losses, all_seen = totals.split([counts.numel(), len(models), 1])
    total = all_seen.item()
    result: dict[str, float] = {}
    for prefix, model_counts, loss in zip(models, all_counts.view(shape), all_losses.tolist()):
        metrics = eval_set.metrics(model_counts) | {"loss": loss / max(total, 1)}
        scored_images = metrics.pop("images")
        result |= {f"{prefix}{key}": value for key, value in metrics.items()}
    return {**result, "images": scored_images, "img_per_sec": total / seconds}
