"""Which parameters are decayed. Two rules, both as parameter groups that keep the parameters' names for reports."""

from __future__ import annotations

from typing import Literal

from torch import nn

DecayRule = Literal["published", "mamba"]
# The state matrix and the skip of the selective scan; Mamba's authors leave both undecayed, the published MambaVision
# training decays A_log (it is 2-d) and not D (it is 1-d).
SCAN_PARAMETERS = ("A_log", "D")


def build_param_groups(model: nn.Module, weight_decay: float, rule: DecayRule = "published") -> list[dict]:
    """Two groups, `decay` and `no_decay` (a group without members is left out), of (name, parameter) pairs.

    published: no decay for tensors of at most one dimension and for names ending in `.bias`.
    mamba: the same, and none for the scan's A_log and D.
    Parameters that do not require a gradient are in no group. torch keeps the names as group["param_names"].
    """
    if rule not in ("published", "mamba"):
        raise ValueError(f"optimizer.decay_rule={rule!r} is not known; use 'published' or 'mamba'")
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith(".bias")
        if rule == "mamba" and name.rsplit(".", 1)[-1] in SCAN_PARAMETERS:
            exempt = True
        (no_decay if exempt else decay).append((name, parameter))
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
