"""The architecture keywords of create_model: their names, defaults and checks. No torch in here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mambavision.models.variants import ARCHITECTURE_FIELDS, VARIANTS

MIXERS = ("concat", "gate", "no_z_conv", "causal_no_z_conv", "no_ssm")
SCAN_BACKENDS = ("auto", "cpu", "triton", "mamba_ssm", "cuda", "reference")
_CHOICES = {
    "mixer": MIXERS,
    "init": ("published", "mamba"),
    "window_padding": ("published", "tight"),
    "scan_backend": SCAN_BACKENDS,
    "stem_stride": (4, 2, 1),
}


@dataclass(frozen=True)
class ModelOptions:
    """Everything that shapes a network or its computation, checked. Build it with `resolve_options`."""

    depths: tuple[int, ...]  # blocks of each of the four stages
    dim: int  # width of stage 1; stages double it
    in_dim: int  # width inside the stem
    num_heads: tuple[int, ...]  # attention heads of the four stages (those of stages 1, 2 are unused)
    window_size: tuple[int, ...]  # side of the windows of stages 3 and 4, in tokens
    drop_path: float  # stochastic depth of the last block, rising linearly from 0 over all blocks
    layer_scale: float | None  # initial per-channel scale of the branches of stages 3, 4; None: no scales
    stem_stride: int  # 4, 2 or 1
    mlp_ratio: float = 4.0
    layer_scale_conv: float | None = None  # the same for stages 1, 2; no published variant has it
    in_chans: int = 3
    mixer: str = "concat"  # concat (published) | gate | no_z_conv | causal_no_z_conv | no_ssm (control)
    stage_pattern: tuple[
        str, ...
    ] = ()  # blocks of stages 3, 4 as letters, M mixer, S attention; (): mixers first, half
    init: str = "published"  # published | mamba
    window_padding: str = "published"  # published | tight (windows shrink to the map instead of padding it)
    scan_backend: str = "auto"  # auto | cpu | triton | mamba_ssm | reference

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} {value!r} does not exist; choose one of {', '.join(map(str, choices))}")
        if len(self.depths) != 4 or min(self.depths) < 0:
            raise ValueError(f"depths {self.depths}: four numbers of blocks, one a stage, e.g. (1, 3, 8, 4)")
        if len(self.num_heads) != 4 or len(self.window_size) != 2 or min(self.window_size) < 1:
            raise ValueError(
                f"num_heads {self.num_heads} and window_size {self.window_size}: give one number for each of stages 3 "
                "and 4, e.g. num_heads=(8, 16) window_size=(14, 7) (or four numbers; stages 1 and 2 ignore theirs)"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} is a probability: 0 <= drop_path < 1")
        for stage in (2, 3):
            width, heads = self.dim * 2**stage, self.num_heads[stage]
            if "S" in self.stage_pattern[stage - 2] and (heads < 1 or width % heads):
                fitting = [h for h in range(1, width + 1) if width % h == 0]
                nearest = min(fitting, key=lambda h: abs(h - heads))
                raise ValueError(
                    f"stage {stage + 1} is {width} channels wide, which {heads} heads do not divide; nearest: {nearest}"
                )


# Keywords of other libraries' models whose letters would lead to a wrong one of ours.
_KEYWORDS_FROM_ELSEWHERE = {
    "img_size": "images of any size are taken, leave it out",
    "pretrained": "weights are taken with checkpoint=PATH (a published file, or the directory of a run)",
    "features_only": "that is timm's, timm.create_model(name, features_only=True); here forward_features gives the maps",
}


def resolve_options(name: str, architecture: dict[str, Any]) -> ModelOptions:
    """The options of a named variant with some of them replaced.

    Raises:
        ValueError: a name or keyword that does not exist, with the nearest that does, or a value that cannot be.
    """
    if name not in VARIANTS:
        raise ValueError(f"model {name!r} does not exist{_did_you_mean(name, VARIANTS)}; all: {', '.join(VARIANTS)}")
    known = [f.name for f in fields(ModelOptions)]
    for keyword in architecture:
        if keyword not in known:
            advice = _KEYWORDS_FROM_ELSEWHERE.get(keyword)
            near = f": {advice}" if advice else _did_you_mean(keyword, known)
            raise ValueError(f"architecture keyword {keyword!r} does not exist{near}; all: {', '.join(known)}")
    values = {field: getattr(VARIANTS[name], field) for field in ARCHITECTURE_FIELDS}
    values.update({k: v for k, v in architecture.items() if k not in ("drop_path", "stage_pattern") or v is not None})
    values["depths"] = _as_tuple("depths", values["depths"])
    values["num_heads"] = _last_stages(_as_tuple("num_heads", values["num_heads"]), wanted=4)
    values["window_size"] = _last_stages(_as_tuple("window_size", values["window_size"]), wanted=2)
    values["stage_pattern"] = stage_patterns(values.get("stage_pattern", ()), values["depths"])
    return ModelOptions(**values)


def stage_patterns(pattern: str | Sequence[str], depths: Sequence[int]) -> tuple[str, str]:
    """The letters of stages 3 and 4, one a block, M for a mixer and S for attention.

    `pattern`: "" for the published rule (the first half, rounded up, are mixers); "MMMMSSSS/MMSS" or a pair of strings
    for both stages; one string for stage 3 alone, stage 4 then keeping the rule; a single letter stands for a whole
    stage ("S/S" is all attention).
    """
    given = tuple(pattern.split("/")) if isinstance(pattern, str) else tuple(pattern)
    given = given + ("",) * (2 - len(given))
    letters = []
    for stage, text in zip((3, 4), given, strict=False):
        depth = depths[stage - 1] if len(depths) == 4 else 0
        text = text.upper()
        if text == "":
            text = _half_mixers(depth)
        elif len(text) == 1:
            text = text * depth
        if len(given) > 2 or len(text) != depth or set(text) - set("MS"):
            raise ValueError(
                f"stage_pattern {pattern!r}: stage {stage} has {depth} blocks and wants {depth} letters, M (mixer) or "
                f"S (attention), e.g. {_half_mixers(depth)!r}; write both stages as 'MMMMSSSS/MMSS'"
            )
        letters.append(text)
    return letters[0], letters[1]


def _half_mixers(depth: int) -> str:
    return "M" * ((depth + 1) // 2) + "S" * (depth // 2)


def _as_tuple(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, int) for v in value):
        raise ValueError(f"{name} {value!r} must be a list of whole numbers, one a stage")
    return tuple(value)


def _last_stages(value: tuple[int, ...], *, wanted: int) -> tuple[int, ...]:
    """Numbers given for stages 3 and 4 alone, or for all four, brought to the form the model keeps."""
    if len(value) == 2 and wanted == 4:
        return (value[0], value[0], *value)
    if len(value) == 4 and wanted == 2:
        return value[2:]
    return value


def _did_you_mean(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.4)
    return f" (nearest: {near[0]!r})" if near else ""
