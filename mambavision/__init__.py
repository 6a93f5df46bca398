"""MambaVision (arXiv 2407.08083), trained end to end. Importing it registers the models with timm.

torch and timm take seconds to import, on a shared file system many. They are imported when they are used, so that a
slip on a command line is answered at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mambavision.timm_hook import register_with_timm

if TYPE_CHECKING:
    from mambavision.models import VARIANTS, Variant, create_model, list_models

__all__ = ["VARIANTS", "Variant", "create_model", "list_models"]

register_with_timm()


def __getattr__(name: str) -> object:
    if name == "models":
        return import_module("mambavision.models")
    if name in __all__:
        return getattr(import_module("mambavision.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
