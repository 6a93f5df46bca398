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


def check(cfg: TrainConfig) -> TrainConfig:
    """Refuse what a run cannot use. Raises ConfigError. The world size is checked later, by `batch_plan`."""
    check_values(cfg)
    for check_group in (_check_run, _check_model, _check_data, _check_loss, _check_schedule, _check_trainer):
        check_group(cfg)
    return cfg


def _check_run(cfg: TrainConfig) -> None:
    if cfg.run_name and os.path.normpath(cfg.run_name).split(os.sep)[0] in (".", ".."):
        raise ConfigError(
            f"run_name={cfg.run_name} is no directory of its own below output_dir={cfg.output_dir}; type run_name=NAME"
        )
    for key in cfg.resume.allow:
        if not (key in (*known_keys(), "data.fingerprint") or key.startswith("model.architecture.")):
            raise ConfigError(f"resume.allow: {unknown_key_advice(key)}")


def _check_model(cfg: TrainConfig) -> None:
    model = cfg.model
    if model.checkpoint is not None and not os.path.exists(model.checkpoint):
        raise ConfigError(
            f"model.checkpoint={model.checkpoint} does not exist; give a .pt or .pth.tar file, or the directory of a "
            "run"
        )
    if model.replace_head and model.checkpoint is None:
        raise ConfigError(
            "model.replace_head=true gives a checkpoint's weights a new head, but no checkpoint is named; type "
            "model.checkpoint=PATH (a file, or the directory of a run), or model.replace_head=false"
        )
    if model.freeze and model.checkpoint is None:
        raise ConfigError(
            f"model.freeze={model.freeze} would keep random weights as they are; type model.checkpoint=PATH (a file, "
            "or the directory of a run)"
        )


def _check_data(cfg: TrainConfig) -> None:
    data = cfg.data
    if data.source != "synthetic" and not data.path:
        raise ConfigError(
            f"data={data.source} needs data.path=DIR (or MAMBAVISION_DATA in the environment); scripts/prepare_data.py "
            "writes such a directory, and data=synthetic needs none"
        )
    if data.source == "synthetic" and not data.num_classes:
        raise ConfigError("data=synthetic needs data.num_classes, for instance data.num_classes=10")
    for key in ("augment.crop_scale", "augment.crop_ratio"):
        low, high = lookup(cfg, key)
        if low > high:
            raise ConfigError(
                f"{key}=[{low:g},{high:g}] has its ends the wrong way round; type {key}=[{high:g},{low:g}]"
            )


def _check_loss(cfg: TrainConfig) -> None:
    t, mixes = cfg.trainer, cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
    if mixes and t.micro_batch_size % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a micro-batch, so trainer.micro_batch_size={t.micro_batch_size} must "
            "be even; or turn them off: augment.mixup=0 augment.cutmix=0"
        )
    if t.mesa.weight > 0 and t.ema_decay == 0:
        raise ConfigError(
            "trainer.mesa distils from the EMA model, which trainer.ema_decay=0 turns off; set trainer.ema_decay=0.9998"
        )
    if t.loss == "bce" and t.mesa.weight > 0:
        raise ConfigError(
            "trainer.mesa distils softmax probabilities, and trainer.loss=bce trains none; type trainer.mesa.weight=0, "
            "or trainer.loss=cross_entropy"
        )
    if t.bce_threshold is not None and t.loss != "bce":
        raise ConfigError(
            f"trainer.bce_threshold={t.bce_threshold:g} belongs to trainer.loss=bce; type trainer.loss=bce as well"
        )
    if t.bce_threshold is not None and mixes and cfg.guard.collapse_loss_margin > 0:
        raise ConfigError(
            "the guard tells a collapsed model by the loss of a blind guess, which is not known for "
            "trainer.bce_threshold with mixup or cutmix; type guard.collapse_loss_margin=0"
        )


def _check_schedule(cfg: TrainConfig) -> None:
    schedule, epochs, lr = cfg.schedule, cfg.trainer.epochs, cfg.optimizer.lr
    if schedule.warmup_epochs > epochs and not schedule.warmup_prefix:
        raise ConfigError(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g} is longer than trainer.epochs={epochs}: no step would "
            f"reach optimizer.lr; type for instance schedule.warmup_epochs={epochs // 10}"
        )
    if schedule.min_lr > lr:
        raise ConfigError(
            f"schedule.min_lr={schedule.min_lr:g} is above optimizer.lr={lr:g}; lower schedule.min_lr, or raise "
            "optimizer.lr"
        )
    if schedule.warmup_epochs > 0 and schedule.warmup_lr > lr:
        raise ConfigError(
            f"schedule.warmup_lr={schedule.warmup_lr:g}, where the warm-up begins, is above optimizer.lr={lr:g}; lower "
            "schedule.warmup_lr, or type schedule.warmup_epochs=0"
        )
    if schedule.name == "constant" and schedule.cooldown_epochs:
        raise ConfigError(
            f"schedule.cooldown_epochs={schedule.cooldown_epochs} adds epochs at the end of a cosine, and "
            "schedule=constant has none; type schedule.cooldown_epochs=0 "
            f"trainer.epochs={epochs + schedule.cooldown_epochs}"
        )


def _check_trainer(cfg: TrainConfig) -> None:
    if cfg.trainer.compile and cfg.trainer.grad_checkpointing:
        raise ConfigError(
            "trainer.compile=true and trainer.grad_checkpointing=true have not been tried together; type "
            "trainer.compile=false or trainer.grad_checkpointing=false"
        )
