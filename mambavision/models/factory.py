"""Models by name: create_model and list_models."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from mambavision.models.backbone import MambaVision
from mambavision.models.options import resolve_options
from mambavision.models.pretrained import load_checkpoint
from mambavision.models.variants import VARIANTS


def create_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int = 1000,
    replace_head: bool = False,
    weights: str = "model",
    **architecture: Any,
) -> MambaVision:
    """A MambaVision by name.

    Args:
        name: one of list_models().
        checkpoint: file of weights, published or ours, or a run directory for its best; loaded strictly.
        num_classes: width of the head; 0: none.
        replace_head: with a checkpoint: start a fresh head, whatever classes the file's is for.
        weights: "model", or "ema" for the moving average kept in our checkpoints.
        architecture: any field of models.options.ModelOptions (depths, dim, window_size, drop_path, mixer, ...).

    Raises:
        ValueError: unknown name or keyword (with the nearest one), impossible value, weights that do not fit.
    """
    model = MambaVision(resolve_options(name, architecture), num_classes=num_classes)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, weights=weights, replace_head=replace_head)
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Names that create_model knows, filtered by a shell pattern ("*_21k")."""
    return fnmatch.filter(VARIANTS, pattern)
