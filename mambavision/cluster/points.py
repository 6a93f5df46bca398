"""The points of a sweep: which there are, what each is called and where it runs. Pure functions of the command line.

`train.py -m ...` and `scripts/submit.py -m ...` both name and place points through this file, so that either continues
what the other has started.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from mambavision.compose import CONF_DIR, check_command_line, compose_train_config, quoted
from mambavision.config import TrainConfig
from mambavision.config_checks import ConfigError
from mambavision.run_dir import makes_another_run

_MULTIRUN_FLAGS = ("-m", "--multirun")
_NAME_LENGTH = 120  # file systems allow 255 bytes; W&B shows about this many
_TAG_LENGTH = 64  # W&B's limit


@dataclass(frozen=True)
class Point:
    """One run of a sweep, or the only run of a plain command."""

    name: str  # the swept settings, e.g. "optimizer.lr=1e-3,model=mambavision_s"; empty for a plain command
    overrides: tuple[str, ...]  # the command line of this point alone, for train.py without -m
    cfg: TrainConfig


def split_multirun(arguments: Iterable[str]) -> tuple[bool, list[str]]:
    """(whether -m is among the arguments, the others)."""
    arguments = list(arguments)
    rest = [a for a in arguments if a not in _MULTIRUN_FLAGS]
    return len(rest) < len(arguments), rest


def expand(overrides: Sequence[str]) -> list[Point]:
    """All points of a sweep in the order in which `train.py -m` runs them, each checked.

    Raises:
        ConfigError: a setting is wrong in some point (every such point is listed), or two points are the same run.
    """
    overrides = check_command_line(list(overrides), TrainConfig)
    fixed, parsed = _with_sweep_file(overrides)
    choices = [_choices(o) for o in parsed]
    keys = swept_keys(fixed)
    name = sweep_name(overrides)
    points, problems = [], []
    for combination in itertools.product(*choices):
        settings = _swept_settings(combination, keys)
        try:
            cfg = place(compose_train_config(list(combination)), name, settings)
        except ConfigError as error:
            problems.append(f"{point_name(settings)}: {error}")
            continue
        points.append(Point(point_name(settings), (*_without_placement(combination), *_placement(cfg)), cfg))
    if problems:
        raise ConfigError(
            "\n".join([f"{len(problems)} of {len(problems) + len(points)} points cannot run:", *problems])
        )
    return points


def single(overrides: Sequence[str]) -> Point:
    """A plain command as a point. Raises ConfigError where -m has been forgotten."""
    overrides = check_command_line(list(overrides), TrainConfig)
    if keys := swept_keys(overrides):
        raise ConfigError(
            f"{', '.join(keys)} is given several values: a sweep needs -m; a value with a comma is written "
            f"'{keys[0]}=\"a,b\"'"
        )
    refuse_sweep_file(overrides)
    return Point("", tuple(overrides), compose_train_config(overrides))


def refuse_sweep_file(overrides: Sequence[str]) -> None:
    """Hydra reads sweep=NAME without -m and ignores it. Raises ConfigError."""
    if files := [o for o in overrides if o.startswith("sweep=") and o != "sweep=null"]:
        raise ConfigError(f"{files[0]} names the points of a sweep, which needs -m; without it there is one run")


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """Keys that are given several values, in order."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return list(dict.fromkeys(o.key_or_group for o in parsed if o.is_sweep_override()))


def sweep_name(overrides: Sequence[str]) -> str:
    """The sweep's directory under output_dir and its W&B group: the explicit run_name, else a hash of what is swept.

    Raises ConfigError where run_name itself is given several values.
    """
    parsed = OverridesParser.create().parse_overrides([o for o in overrides if o.startswith("run_name=")])
    if parsed and parsed[-1].is_sweep_override():
        raise ConfigError(
            f"{parsed[-1].input_line} gives several values: run_name names a sweep, whose points are named by what is "
            "varied; vary a setting, for instance seed=0,1"
        )
    if parsed and (explicit := str(parsed[-1].value())).strip():
        return explicit
    settings = sorted(o for o in overrides if o.split("=", 1)[0].split(".")[0] not in ("hydra", "logger", "output_dir"))
    return f"sweep-{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"


def point_name(settings: Sequence[str]) -> str:
    """Readable, and safe as a directory: anything but letters, digits and ._=,+- becomes _."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", re.sub(r"['\"\[\]{}]", "", ",".join(settings)))
    if len(name) <= _NAME_LENGTH:
        return name
    return f"{name[: _NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def place(cfg: TrainConfig, sweep: str, settings: Sequence[str]) -> TrainConfig:
    """The configuration of a sweep's point: its own directory, the sweep as W&B group, its settings as W&B tags.

    A derived run name (the hash of the configuration) already differs from point to point and is left alone, so that
    two sweeps share the points they have in common; unless something is swept that is no part of such a name, as the
    precision or the device.
    """
    named = all(_is_part_of_a_name(s.split("=", 1)[0]) for s in settings)
    run_name = "" if named and not cfg.run_name else f"{sweep}/{point_name(settings)}"
    tags = (*cfg.logger.tags, *(s[:_TAG_LENGTH] for s in settings))
    return replace(cfg, run_name=run_name, logger=replace(cfg.logger, group=cfg.logger.group or sweep, tags=tags))


def _is_part_of_a_name(key: str) -> bool:
    return makes_another_run(key) and key not in ("trainer", "logger")  # these groups hold little else


def place_in_multirun(
    cfg: TrainConfig, command_line: Sequence[str], job_overrides: Sequence[str], sweeper_keys: Sequence[str]
) -> TrainConfig:
    """`place` for a job of Hydra's multirun; sweeper_keys: what the sweeper's own file varies."""
    overrides = [word for word in command_line if "=" in word and not word.startswith("-")]
    keys = [*swept_keys(overrides), *sweeper_keys]
    return place(cfg, sweep_name(overrides), _swept_settings(job_overrides, keys))


def _swept_settings(job_overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    values = {o.split("=", 1)[0].lstrip("+"): o.lstrip("+") for o in job_overrides}
    return [values[k] for k in dict.fromkeys(keys) if k in values]


def _with_sweep_file(overrides: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Replace sweep=NAME by the parameters of conf/sweep/NAME.yaml; what the command line says wins."""
    words = [o for o in overrides if not o.startswith("sweep=")]
    given = {o.split("=", 1)[0] for o in words}
    params: list[str] = []
    for choice in (o.split("=", 1)[1] for o in overrides if o.startswith("sweep=")):
        content = yaml.safe_load((CONF_DIR / "sweep" / f"{choice}.yaml").read_text())
        hydra = content.get("hydra", {})
        if "hydra/sweeper" in str(content.get("defaults", "")):
            raise ConfigError(f"sweep={choice} chooses its points as it goes; run it with train.py -m sweep={choice}")
        params += [f"{k}={v}" for k, v in hydra.get("sweeper", {}).get("params", {}).items() if k not in given]
    words = params + words
    return words, OverridesParser.create().parse_overrides(words)


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line} is a continuous range; list its values: {override.key_or_group}=1e-3,2e-3"
        )
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _without_placement(overrides: Iterable[str]) -> list[str]:
    return [o for o in overrides if not o.startswith(("run_name=", "logger.group=", "logger.tags="))]


def _placement(cfg: TrainConfig) -> list[str]:
    tags = ",".join(quoted(t) for t in cfg.logger.tags)
    run_name = [f"run_name={quoted(cfg.run_name)}"] if cfg.run_name else []
    return [*run_name, f"logger.group={quoted(cfg.logger.group or '')}", f"logger.tags=[{tags}]"]
