"""LAMB, parameter groups, gradient clip, EMA; the learning rate's schedule is in `schedule`."""

from mambavision.optim.build import OPTIMIZERS, SGD, AdamW, TorchOptimizerLamb, build_optimizer, load_optimizer_state
from mambavision.optim.clip import clear_gradients, global_grad_norm
from mambavision.optim.ema import ModelEma
from mambavision.optim.lamb import Lamb
from mambavision.optim.param_groups import build_param_groups

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "Lamb",
    "ModelEma",
    "TorchOptimizerLamb",
    "build_optimizer",
    "build_param_groups",
    "clear_gradients",
    "global_grad_norm",
    "load_optimizer_state",
]
