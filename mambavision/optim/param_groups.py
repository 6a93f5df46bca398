"""Which parameters are decayed, and which learn slower: as parameter groups that keep the parameters' names for reports."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

DecayRule = Literal["published", "mamba"]
# The state matrix and the skip of the selective scan; Mamba's authors leave both undecayed, the published MambaVision
# training decays A_log (it is 2-d) and not D (it is 1-d).
SCAN_PARAMETERS = ("A_log", "D")


def build_param_groups(
    model: nn.Module, weight_decay: float, rule: DecayRule = "published", layer_decay: float | None = None
) -> list[dict]:
    """Two groups, `decay` and `no_decay` (a group without members is left out), of (name, parameter) pairs.

    published: no decay for tensors of at most one dimension and for names ending in `.bias`.
    mamba: the same, and none for the scan's A_log and D.
    layer_decay: a MambaVision's learning rate falls by this factor per layer from the head down (Bao et al. 2021, BEiT):
    two such groups for each layer (`layer_numbers`), stem first, with layer_decay ** (layers above) as group["lr_scale"],
    by which the trainer multiplies the rate. None and 1: the two groups alone, without it.
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
    if layer_decay not in (None, 1):
        groups = _by_layer(groups, layer_numbers([name for name, _ in model.named_parameters()]), layer_decay)
    return [group for group in groups if group["params"]]


def layer_numbers(names: list[str]) -> dict[str, int]:
    """The layer of each of a MambaVision's parameters, given the names of all.

    The stem is layer 0; every block of every stage is a layer of its own, in order; a stage's downsampling belongs to its
    last block; the last norm and the head are the last layer.
    """
    blocks = sorted(
        {(int(m[1]), int(m[2])) for name in names if (m := re.match(r"levels\.(\d+)\.blocks\.(\d+)\.", name))}
    )

    def number(name: str) -> int:
        part, stage, kind, block = (*name.split("."), "", "", "")[:4]
        if part == "levels":  # as many as there are blocks up to this one, or to the end of its stage
            return sum(b <= (int(stage), int(block) if kind == "blocks" else len(blocks)) for b in blocks)
        assert part in ("patch_embed", "norm", "head"), f"{name} is in no layer of a MambaVision"
        return 0 if part == "patch_embed" else len(blocks) + 1

    return {name: number(name) for name in names}


def _by_layer(groups: list[dict], layer_of: dict[str, int], layer_decay: float) -> list[dict]:
    last = max(layer_of.values())
    return [
        {
            **group,
            "name": f"layer_{layer}_{group['name']}",
            "params": [(name, parameter) for name, parameter in group["params"] if layer_of[name] == layer],
            "lr_scale": layer_decay ** (last - layer),
        }
        for layer in range(last + 1)
        for group in groups
    ]
