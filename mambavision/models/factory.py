"""Models by name: create_model, list_models, and the same names in timm's registry."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from mambavision.models.backbone import MambaVision
from mambavision.models.options import resolve_options
from mambavision.models.pretrained import load_checkpoint
from mambavision.models.variants import VARIANTS, Variant

__all__: list[str] = []  # timm's registration appends the names of the models


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
        checkpoint: file of weights, published or ours; loaded strictly.
        num_classes: width of the head; 0: none.
        replace_head: with a checkpoint of another number of classes: start a fresh head instead of refusing.
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


def _timm_cfg(variant: Variant) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, variant.image_size, variant.image_size),
        "pool_size": None,
        "crop_pct": variant.crop_pct,
        "crop_mode": variant.crop_mode,
        "interpolation": variant.interpolation,
        "mean": variant.mean,
        "std": variant.std,
        "first_conv": "patch_embed.conv_down.0",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({name: _timm_cfg(variant) for name, variant in VARIANTS.items()})


def _register_with_timm(name: str) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # timm's own words for two of our keywords, and one that has a single meaning here.
        if "drop_path_rate" in kwargs:
            kwargs["drop_path"] = kwargs.pop("drop_path_rate")
        if kwargs.pop("global_pool", "avg") != "avg":
            raise ValueError("global_pool: MambaVision pools by the average, global_pool='avg'")
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(
            _build_for_timm, name, pretrained, feature_cfg=features, variant_name=name, **kwargs
        )

    entry.__name__ = entry.__qualname__ = name
    register_model(entry)


def _build_for_timm(*, variant_name: str, num_classes: int = 1000, **architecture: Any) -> MambaVision:
    return MambaVision(resolve_options(variant_name, architecture), num_classes=num_classes)


for _name in VARIANTS:
    _register_with_timm(_name)
