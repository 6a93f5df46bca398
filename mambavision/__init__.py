"""MambaVision (arXiv 2407.08083), trained end to end. Importing it registers the models with timm."""

from mambavision.models import VARIANTS, Variant, create_model, list_models

__all__ = ["VARIANTS", "Variant", "create_model", "list_models"]
