"""The models in timm's registry: timm.create_model("mambavision_t"). Imported when timm is (timm_hook)."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from mambavision.models.backbone import MambaVision
from mambavision.models.options import resolve_options
from mambavision.models.variants import VARIANTS, Variant

__all__: list[str] = []  # timm's registration appends the names of the models


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
        if kwargs.pop("global_pool", None) not in (None, "avg"):
            raise ValueError("global_pool: MambaVision pools by the average, global_pool='avg'")
        # timm's train.py always passes it. Its other keywords are None by default, which timm.create_model leaves out.
        if drop_rate := kwargs.pop("drop_rate", 0):
            raise ValueError(f"drop_rate={drop_rate}: MambaVision has no dropout before its head; use drop_path_rate")
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
