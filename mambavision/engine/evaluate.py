"""Exact evaluation: every image counted once, at any world size and batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.distributed import World, sum_over_ranks
from mambavision.engine.losses import top_k_correct


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable,
    *,
    prepare: Callable[[Tensor], Tensor],
    autocast: Callable[[], torch.autocast],
    world: World,
) -> dict[str, float]:
    """Top-1, Top-5 (percent) and cross-entropy of each model over all ranks' `batches`, in one pass over the data.

    models: prefix -> model, for instance {"": model, "ema_": ema.module}; the keys returned are "<prefix>top1", ...
    prepare: uint8 images (B, 3, H, W) on the device -> what the models take.
    """
    was_training = {prefix: model.training for prefix, model in models.items()}
    for model in models.values():
        model.eval()
    # One row a model: right among 1, right among 5, loss; float64 holds counts exactly.
    sums = torch.zeros(len(models), 3, dtype=torch.float64, device=world.device)
    count = 0
    start = time.perf_counter()
    for batch in batches:
        batch = batch.to(world.device)
        images = prepare(batch.images)
        for row, model in zip(sums, models.values()):
            with autocast():
                logits = model(images)
            logits = logits.float()
            top1, top5 = top_k_correct(logits, batch.targets)
            row += torch.stack([top1, top5, F.cross_entropy(logits, batch.targets, reduction="sum")]).to(row.dtype)
        count += len(batch.targets)
    totals = sum_over_ranks(torch.cat([sums.flatten().cpu(), torch.tensor([count], dtype=torch.float64)]))
    seconds = time.perf_counter() - start
    for prefix, model in models.items():
        model.train(was_training[prefix])
    total = totals[-1].item()
    result: dict[str, float] = {}
    for prefix, (top1, top5, loss) in zip(models, totals[:-1].view(-1, 3).tolist()):
        result |= {
            f"{prefix}top1": 100 * top1 / total,
            f"{prefix}top5": 100 * top5 / total,
            f"{prefix}loss": loss / total,
        }
    return {**result, "images": int(total), "img_per_sec": total / seconds}
