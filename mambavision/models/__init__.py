"""The networks: named variants, the backbone and its parts, weights from files."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mambavision.models.backbone import MambaVision
    from mambavision.models.factory import create_model, list_models
    from mambavision.models.fusion import fuse_for_inference
    from mambavision.models.pretrained import load_checkpoint
    from mambavision.models.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "MambaVision", "Variant", "create_model", "fuse_for_inference", "list_models", "load_checkpoint"]

_HOME = {
    "MambaVision": "backbone",
    "create_model": "factory",
    "list_models": "factory",
    "fuse_for_inference": "fusion",
    "load_checkpoint": "pretrained",
    "VARIANTS": "variants",
    "Variant": "variants",
}


def __getattr__(name: str) -> object:
    """Imports torch only for what needs it: the names and sizes in `variants` are asked for before any training."""
    if name in _HOME:
        return getattr(import_module(f"mambavision.models.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
