"""From Hydra's dict to the typed configuration, refusing with advice whatever does not fit. Owns no defaults."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from typing import Any, TypeVar

from mambavision.config import EvalConfig, TrainConfig
from mambavision.config_ranges import CHOICES, RANGES, out_of_range
from mambavision.config_words import WORDS_FROM_ELSEWHERE

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration the user can mend; the message says how."""


def to_config(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """Build dataclass `cls` from nested plain dicts, naming unknown keys and wrong types by their full key.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(unknown_key_advice(f"{path}{key}"))
    return cls(**{k: _convert(v, hints[k], f"{path}{k}") for k, v in values.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{key} is a group of settings and cannot be {value!r}; set one of its keys: {key}.<name>=..."
            )
        return to_config(hint, value, f"{key}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} takes a list, not {value!r}: type {key}=[...]")
        items = tuple(_convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ConfigError(
                f"{key} takes {len(args)} numbers, not {len(items)}: type {key}=[{','.join(['...'] * len(args))}]"
            )
        return items
    if origin is dict or hint is Any:
        return value
    return _convert_scalar(value, hint, key)


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, bool):  # YAML reads off as False and on as True
        return "on" if value else "off"
    if hint is str and isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
    example = {int: "8", float: "0.1", bool: "true", str: "name"}[hint]
    raise ConfigError(f"{key}={value!r} is not {wanted}; type for instance {key}={example}")


def known_keys(cls: type = TrainConfig, path: str = "") -> list[str]:
    """All full keys of a configuration class, groups included."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(f"{path}{name}")
        if dataclasses.is_dataclass(hint):
            keys += known_keys(hint, f"{path}{name}.")
    return keys


def text_keys(cls: type, path: str = "") -> list[str]:
    """Full keys of the settings that are texts."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += text_keys(hint, f"{path}{name}.")
        elif hint in (str, str | None):
            keys.append(f"{path}{name}")
    return keys


def _group_names(cls: type) -> set[str]:
    return {k.rsplit(".", 1)[0] for k in known_keys(cls) if "." in k}


def advice_for_words_from_elsewhere(key: str, cls: type = TrainConfig) -> str | None:
    """What to type for a name that other programs have; None where it is none of them, or a setting here."""
    is_setting = key in known_keys(cls) and key not in _group_names(cls)
    advice = WORDS_FROM_ELSEWHERE.get(key.rsplit(".", 1)[-1].replace("-", "_"))
    return f"{key}= is no setting; {advice}" if advice and cls is TrainConfig and not is_setting else None


def unknown_key_advice(key: str, cls: type = TrainConfig) -> str:
    if advice := advice_for_words_from_elsewhere(key, cls):
        return advice
    keys = known_keys(cls)
    leaf = key.rsplit(".", 1)[-1]
    # The right name in another group ("lr" for "optimizer.lr") is as likely a slip as a misspelling.
    near = [k for k in keys if k.rsplit(".", 1)[-1] == leaf] + difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    near = list(dict.fromkeys(k for k in near if k not in _group_names(cls)))[:2]
    if near:
        return f"there is no setting {key!r}; did you mean {' or '.join(near)}?"
    group = key.rsplit(".", 1)[0] if "." in key else ""
    siblings = [k for k in keys if k.rsplit(".", 1)[0] == group] if group else [k for k in keys if "." not in k]
    return (
        f"there is no setting {key!r}; known here: {', '.join(siblings) or ', '.join(k for k in keys if '.' not in k)}"
    )


def lookup(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = getattr(cfg, part, None)
    return cfg


def check_values(cfg: TrainConfig | EvalConfig) -> None:
    """Refuse values outside their choices or ranges, whatever group they stand in."""
    for key, choices in CHOICES.items():
        value = lookup(cfg, key)
        if value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            advice = f"did you mean {key}={near[0]}? " if near else ""
            raise ConfigError(f"{key}={value} is not known; {advice}one of: {', '.join(choices)}")
    for key, interval in RANGES.items():
        value = lookup(cfg, key)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            if wanted := out_of_range(number, interval):
                shown = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value
                raise ConfigError(f"{key}={shown} is out of range: it must be {wanted}")


def check_combinations(cfg: TrainConfig) -> None:
    """Refuse settings that contradict each other. The world size is checked later, by `batch_plan`."""
    t, a = cfg.trainer, cfg.augment
    if cfg.data.source != "synthetic" and not cfg.data.path:
        raise ConfigError(
            f"data={cfg.data.source} needs data.path=DIR (or MAMBAVISION_DATA in the environment); scripts/prepare_data.py "
            "writes such a directory, and data=synthetic needs none"
        )
    if cfg.data.source == "synthetic" and not cfg.data.num_classes:
        raise ConfigError("data=synthetic needs data.num_classes, for instance data.num_classes=10")
    if t.mesa.weight > 0 and t.ema_decay == 0:
        raise ConfigError(
            "trainer.mesa distils from the EMA model, which trainer.ema_decay=0 turns off; set trainer.ema_decay=0.9998"
        )
    if t.loss == "bce" and t.mesa.weight > 0:
        raise ConfigError(
            "trainer.mesa distils between answers that compete (softmax), which those of trainer.loss=bce do not; type "
            "trainer.mesa.weight=0, or trainer.loss=cross_entropy"
        )
    if t.bce_threshold is not None and t.loss != "bce":
        raise ConfigError(f"trainer.bce_threshold={t.bce_threshold:g} belongs to trainer.loss=bce; type that as well")
    if t.bce_threshold is not None and (a.mixup > 0 or a.cutmix > 0) and cfg.guard.collapse_loss_margin > 0:
        raise ConfigError(
            "with trainer.bce_threshold and mixed images the loss of a blind guess is not known, by which the guard tells a "
            "collapsed model; type guard.collapse_loss_margin=0"
        )
    if cfg.schedule.warmup_epochs > t.epochs and not cfg.schedule.warmup_prefix:
        raise ConfigError(
            f"schedule.warmup_epochs={cfg.schedule.warmup_epochs:g} is longer than trainer.epochs={t.epochs}: no step would reach "
            f"optimizer.lr; type for instance schedule.warmup_epochs={max(t.epochs // 10, 0)}"
        )
    if cfg.schedule.min_lr > cfg.optimizer.lr:
        raise ConfigError(
            f"schedule.min_lr={cfg.schedule.min_lr:g} is above optimizer.lr={cfg.optimizer.lr:g}; lower min_lr"
        )
    if cfg.schedule.warmup_epochs > 0 and cfg.schedule.warmup_lr > cfg.optimizer.lr:
        raise ConfigError(
            f"schedule.warmup_lr={cfg.schedule.warmup_lr:g}, where the warm-up begins, is above optimizer.lr="
            f"{cfg.optimizer.lr:g}; lower warmup_lr, or type schedule.warmup_epochs=0"
        )
    if cfg.schedule.name == "constant" and cfg.schedule.cooldown_epochs:
        raise ConfigError(
            f"schedule.cooldown_epochs={cfg.schedule.cooldown_epochs} are epochs at the end of a cosine, which schedule=constant "
            f"does not have; type schedule.cooldown_epochs=0 trainer.epochs={t.epochs + cfg.schedule.cooldown_epochs}"
        )
    if (a.mixup > 0 or a.cutmix > 0) and t.micro_batch_size % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a micro-batch, so trainer.micro_batch_size={t.micro_batch_size} must be even; "
            "or turn them off: augment.mixup=0 augment.cutmix=0"
        )
    for key in ("augment.crop_scale", "augment.crop_ratio"):
        low, high = lookup(cfg, key)
        if low > high:
            raise ConfigError(
                f"{key}=[{low:g},{high:g}] has its ends the wrong way round; type {key}=[{high:g},{low:g}]"
            )
    if cfg.run_name and os.path.normpath(cfg.run_name).split(os.sep)[0] in (".", ".."):
        raise ConfigError(
            f"run_name={cfg.run_name} is no directory of its own below output_dir={cfg.output_dir}; type run_name=NAME"
        )
    for key in cfg.resume.allow:
        if not (key in (*known_keys(), "data.fingerprint") or key.startswith("model.architecture.")):
            raise ConfigError(f"resume.allow: {unknown_key_advice(key)}")
    if cfg.trainer.compile and cfg.trainer.grad_checkpointing:
        raise ConfigError(
            "trainer.compile=true and trainer.grad_checkpointing=true have not been tried together; type "
            "trainer.compile=false or trainer.grad_checkpointing=false"
        )
    if cfg.debug not in (None, "nan", "profile"):
        raise ConfigError(f"debug={cfg.debug} is not known; type debug=nan or debug=profile, or leave it out")
    if cfg.model.replace_head and cfg.model.checkpoint is None:
        raise ConfigError(
            "model.replace_head=true is for weights that a run begins from, and there are none: type model.checkpoint=PATH (a "
            "file, or the directory of a run), or model.replace_head=false"
        )
    if cfg.model.freeze and cfg.model.checkpoint is None:
        raise ConfigError(
            f"model.freeze={cfg.model.freeze} would keep random weights as they are; type model.checkpoint=PATH (a file, or the "
            "directory of a run)"
        )
    if cfg.model.checkpoint is not None and not os.path.exists(cfg.model.checkpoint):
        raise ConfigError(
            f"model.checkpoint={cfg.model.checkpoint} does not exist; give the path of a .pt or .pth.tar file"
        )


def check(cfg: TrainConfig) -> TrainConfig:
    check_values(cfg)
    check_combinations(cfg)
    return cfg


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How the global batch is spread over ranks: `accum_steps` micro-batches each, the same groups at any world size."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def accum_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {self.micro_batch_size} images x {self.world_size} ranks "
            f"x {self.accum_steps} accumulated micro-batches"
        )


def batch_plan(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchPlan:
    """Raises ConfigError where the global batch cannot be cut into micro-batches for so many ranks, naming the nearest that can."""
    if global_batch_size % (micro_batch_size * world_size) == 0:
        return BatchPlan(global_batch_size, micro_batch_size, world_size)
    unit = micro_batch_size * world_size
    below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
    nearest = above if below == 0 or above - global_batch_size < global_batch_size - below else below
    micros = [m for m in range(1, global_batch_size + 1) if global_batch_size % (m * world_size) == 0]
    same_global = (
        f", or keep it with trainer.micro_batch_size={min(micros, key=lambda m: abs(m - micro_batch_size))} "
        "(BatchNorm then sees other groups, which changes results)"
        if micros
        else ""
    )
    raise ConfigError(
        f"trainer.global_batch_size={global_batch_size} cannot be cut into micro-batches of trainer.micro_batch_size={micro_batch_size} "
        f"on {world_size} rank{'s' * (world_size > 1)}; nearest: trainer.global_batch_size={nearest}{same_global}"
    )
