"""The networks: named variants, the backbone and its parts, weights from files."""

from mambavision.models.backbone import MambaVision
from mambavision.models.factory import create_model, list_models
from mambavision.models.fusion import fuse_for_inference
from mambavision.models.pretrained import load_checkpoint
from mambavision.models.variants import VARIANTS, Variant

__all__ = ["VARIANTS", "MambaVision", "Variant", "create_model", "fuse_for_inference", "list_models", "load_checkpoint"]
