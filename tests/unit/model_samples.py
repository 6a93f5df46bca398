"""A model of all four stages that is small enough to train within a test, and how near two results are."""

import torch
from torch import Tensor, nn

from mambavision import create_model

MICRO = {"dim": 16, "in_dim": 8, "depths": (1, 1, 3, 2), "num_heads": (1, 1, 2, 4), "window_size": (8, 8, 4, 2)}


def micro(**overrides) -> nn.Module:
    torch.manual_seed(0)
    return create_model("mambavision_t", **{"num_classes": 10, **MICRO, "drop_path": 0.0, **overrides})


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
