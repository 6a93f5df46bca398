"""From the command line to a checked configuration: the only file that talks to Hydra, beside train.py and eval.py."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mambavision.config import EvalConfig, TrainConfig
from mambavision.config_checks import (
    ConfigError,
    advice_for_words_from_elsewhere,
    check,
    check_values,
    known_keys,
    text_keys,
    to_config,
    unknown_key_advice,
)

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def compose_train_config(overrides: list[str]) -> TrainConfig:
    """The configuration that `train.py` with these overrides would run.

    Raises:
        ConfigError: with advice, for anything the user can mend.
    """
    overrides = check_overrides(overrides, TrainConfig)
    return typed_train_config(_compose("train", overrides))


def compose_eval_config(overrides: list[str]) -> EvalConfig:
    """The configuration of `eval.py` with these overrides."""
    overrides = check_overrides(overrides, EvalConfig)
    composed = _plain(_compose("eval", overrides))
    # A model file carries its training recipe besides; an evaluation has no use for it.
    cfg = to_config(EvalConfig, {k: v for k, v in composed.items() if k in {f.name for f in fields(EvalConfig)}})
    check_values(cfg)
    return cfg


def typed_train_config(composed: DictConfig) -> TrainConfig:
    return check(to_config(TrainConfig, _plain(composed)))


def _compose(name: str, overrides: list[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error


def _plain(composed: DictConfig) -> dict:
    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from error


# Hydra's own flags that are followed by a word which is not a setting, and the others.
_FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
}
_FLAGS_ALONE = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--info", "-i"),
    *("--shell-completion", "-sc", "--experimental-rerun"),
}


def check_command_line(arguments: list[str], cls: type) -> list[str]:
    """`check_overrides` for a whole command line. Hydra's flags (-m, --cfg job, ...) come last in what is returned:
    between settings its parser takes none."""
    arguments = [a for a in arguments if a != "--"]  # which only says that settings follow
    for argument in arguments:
        if argument.startswith("-") and argument.partition("=")[0] not in _FLAGS_WITH_VALUE | _FLAGS_ALONE:
            raise ConfigError(_no_such_flag(argument, cls))
    after_flag = [False, *(a in _FLAGS_WITH_VALUE for a in arguments)]
    is_override = [not a.startswith("-") and not follows for a, follows in zip(arguments, after_flag)]
    overrides, flags = ([a for a, yes in zip(arguments, is_override) if yes is kind] for kind in (True, False))
    return check_overrides(overrides, cls) + flags


def _no_such_flag(argument: str, cls: type) -> str:
    flag, _, value = argument.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    how = f"{flag} is no flag of this program: settings are written key=value, without dashes"
    if name in _groups_of(cls) or name in known_keys(cls):
        return f"{how}: {name}={value or '...'}"
    return f"{how}; {unknown_key_advice(name, cls)}"


def check_overrides(overrides: list[str], cls: type) -> list[str]:
    """Look the given `key=value` words over before Hydra does, so that a slip is answered with what to type instead.

    Hydra accepts any new key with a leading `+` and answers unknown keys without a suggestion; both are refused here.
    Returns the overrides as Hydra wants them: no `+` before a group (both spellings are in use), one before the
    free-form model.architecture keys, and in quotes texts that look like numbers or that its grammar cannot read.
    """
    texts = text_keys(cls)
    overrides = [_listed(_readable(_normalise(o), texts)) for o in overrides]
    parsed = [_parse(o) for o in overrides]
    for override in parsed:
        _check_override(override, cls)
    return [_as_typed(o, p) if p.key_or_group in texts else o for o, p in zip(overrides, parsed)]


def _readable(override: str, texts: list[str]) -> str:
    """For Hydra no letter but the English, and no bracket, may stand in a value without quotes; directories have both."""
    key, _, value = override.partition("=")
    if key.lstrip("+") not in texts or "," in value:  # with commas perhaps a sweep
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}={quoted(value)}"
    return override


def _listed(override: str) -> str:
    """model=glob(*_21k) as the choices that it stands for, which Hydra can tell only where it runs."""
    parsed = _parse(override)
    pattern, group = parsed.value(), parsed.key_or_group
    if not isinstance(pattern, Glob):
        return override
    if not _is_group(group):
        raise ConfigError(f"{override}: glob() is for groups, and {group} is none; list its values: {group}=A,B")
    chosen = pattern.filter(group_choices(group))
    if not chosen:
        raise ConfigError(f"{override} stands for nothing; available: {', '.join(group_choices(group))}")
    return f"{group}={','.join(chosen)}"


def _as_typed(override: str, parsed: Override) -> str:
    """For Hydra run_name=1.10 is the number 1.1, and 20260101_01 is 2026010101: other names, perhaps other runs'."""
    if parsed.is_sweep_override() or not isinstance(parsed.value(), (bool, int, float)):
        return override
    key, _, value = override.partition("=")
    return f"{key}={quoted(value)}"


def _parse(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"cannot read {override!r}: {error}; {_how_to_write(override)}") from error


def _how_to_write(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return "settings are written key=value, e.g. optimizer.lr=0.005"
    escaped = value.replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{escaped}"')
    return f"a value with ( ) , = ~ {{ }} [ ] or quotes in it is quoted twice, once for the shell; type {quoted}"


def _normalise(override: str) -> str:
    key, equals, value = override.partition("=")
    # A shell expands ~ only where a word, or the value of a name without dots, begins with it.
    override = key + equals + os.path.expanduser(value)
    bare = override.lstrip("+")
    if _is_group(bare.split("=", 1)[0]):
        return bare
    return f"++{bare}" if bare.startswith("model.architecture.") else override


def _check_override(override: Override, cls: type) -> None:
    key = override.key_or_group
    if key.startswith("hydra"):
        return
    if override.is_delete() and not key.startswith("model.architecture."):
        instead = f"{key}={'|'.join(group_choices(key))}" if _is_group(key) else f"{key}=VALUE"
        raise ConfigError(
            f"~{key} would not turn it off: a setting that is taken away has the default of mambavision/config.py; type {instead}"
        )
    if _is_group(key):
        if key not in (own := _groups_of(cls)):
            raise ConfigError(f"{key}= is no group of this program; its groups are {', '.join(own)}")
        for choice in _choices_given(override):
            _check_choice(key, choice)
        return
    # checkpoint={keep_last: 2} sets keys of a group; checkpoint=PATH is another program's.
    sets_keys = override.input_line.partition("=")[2].lstrip().startswith("{")
    if not sets_keys and (advice := advice_for_words_from_elsewhere(key, cls)):
        raise ConfigError(advice)
    keys = known_keys(cls)
    # Below a free-form mapping (model.architecture.depths=...) create_model checks the names.
    if key in keys or key.startswith("model.architecture."):
        return
    near_groups = difflib.get_close_matches(key, groups(), n=1, cutoff=0.7)
    if "." not in key and near_groups:
        raise ConfigError(f"there is no setting {key!r}; did you mean {near_groups[0]}=...?")
    raise ConfigError(unknown_key_advice(key, cls))


def _choices_given(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(v).strip("'\"") for v in override.sweep_string_iterator()]
    value = override.value()
    return [] if value is None else [str(v) for v in (value if isinstance(value, list) else [value])]


def _check_choice(group: str, choice: str) -> None:
    available = group_choices(group)
    if choice not in available:
        near = difflib.get_close_matches(choice, available, n=3, cutoff=0.5)
        advice = f"did you mean {group}={near[0]}? " if near else ""
        if group == "data" and os.sep in choice:
            advice = f"did you mean data.path={choice}? "
        raise ConfigError(f"there is no {group}={choice}; {advice}available: {', '.join(available)}")


def quoted(text: str) -> str:
    """As a string of Hydra's override grammar, whatever characters it has."""
    return QuotedString(text, Quote.single).with_quotes()


def groups() -> list[str]:
    return sorted(p.name for p in CONF_DIR.iterdir() if p.is_dir())


def group_choices(group: str) -> list[str]:
    root = CONF_DIR / group
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml") if p.stem != "base")


def _groups_of(cls: type) -> list[str]:
    """The groups that train.py or eval.py composes, as its file in conf/ lists them."""
    root = CONF_DIR / ("eval.yaml" if cls is EvalConfig else "train.yaml")
    defaults = [entry for entry in yaml.safe_load(root.read_text())["defaults"] if isinstance(entry, dict)]
    return [key for entry in defaults for key in entry if not key.startswith("override ")]


def _is_group(key: str) -> bool:
    return (CONF_DIR / key).is_dir()


def refuse(error: ValueError) -> NoReturn:
    """What the user can mend is said once on each node and without a traceback (HYDRA_FULL_ERROR=1 shows it)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error
