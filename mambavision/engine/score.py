"""Scoring a checkpoint on an evaluation set: what eval.py does. Knows both our checkpoints and the published ones."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import data
from data.batch import EvalLoader
from data.batch_transform import BatchTransform
from data.class_names import first_difference, renumbered
from mambavision import VARIANTS, create_model, distributed
from mambavision.cluster.points import point_name
from mambavision.compose import quoted
from mambavision.config import AugmentConfig, EvalConfig, ModelConfig
from mambavision.distributed import World
from mambavision.engine import checkpoint
from mambavision.engine.evaluate import evaluate
from mambavision.engine.precision import autocast_context, resolve_precision
from mambavision.engine.predictions import Predictions
from mambavision.models.pretrained import find_file, find_weights, load_weights, read_checkpoint
from mambavision.run_dir import plain, write_atomically

# How a variant's published weights are scored.
_PUBLISHED_SCORING = ("image_size", "crop_pct", "crop_mode")
# What a run's evaluation depends on; taken over from a checkpoint of ours unless given.
_IMPLIED_DATA = (*_PUBLISHED_SCORING, "eval_interpolation", "mean", "std")
_IMPLIED_MODEL = ("architecture", "init", "window_padding")
_REAL_CLASSES = 1000


def implied_overrides(given: list[str]) -> list[str]:
    """What the checkpoint named in the command line says about model and data, as overrides to stand before it."""
    keys = {o.split("=", 1)[0].lstrip("+") for o in given}
    path = next((_unquoted(o.split("=", 1)[1]) for o in given if o.startswith("checkpoint=")), "")
    if not path:
        raise ValueError("eval.py needs a checkpoint; type checkpoint=PATH (a file, or a run directory for its best)")
    content = read_checkpoint(find_file(path))
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        return _published_overrides(content, path, given, keys)
    implied = []
    if "model" not in keys:
        implied.append(f"model={config['model']['name']}")
        for key in _IMPLIED_MODEL:
            implied += _as_overrides(f"model.{key}", config["model"][key])
    if "data" not in keys:
        implied.append(f"data={config['data']['source']}")
        for key in ("path", "num_classes", "synthetic_train_samples", "synthetic_eval_samples"):
            implied += _as_overrides(f"data.{key}", config["data"][key])
    for key in _IMPLIED_DATA:
        implied += _as_overrides(f"data.{key}", config["data"][key])
    return [o for o in implied if o.split("=", 1)[0] not in keys]


def with_quoted_checkpoint(given: list[str]) -> list[str]:
    """The command line as Hydra reads it: a path may hold =, spaces or brackets, as the runs of a sweep do."""
    return [f"checkpoint={quoted(_unquoted(o.split('=', 1)[1]))}" if o.startswith("checkpoint=") else o for o in given]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _published_overrides(content: Any, path: str, given: list[str], keys: set[str]) -> list[str]:
    """For a file without our settings: its variant, and that variant's published image size and crop.

    The model files in conf/ hold the crops of training runs, which for some variants are others.
    """
    name = next((o.split("=", 1)[1] for o in given if o.startswith("model=")), None) or variant_of(content, path)
    implied = [f"model={name}"]
    if name in VARIANTS:
        implied += [f"data.{key}={getattr(VARIANTS[name], key)}" for key in _PUBLISHED_SCORING]
    return [o for o in implied if o.split("=", 1)[0] not in keys]


def _as_overrides(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [o for k, v in value.items() for o in _as_overrides(f"{key}.{k}", v)]
    # A text as Hydra reads it: in JSON's a letter of another language would be six (\u00e9), a backslash two.
    return [f"{key}={quoted(value) if isinstance(value, str) else json.dumps(value)}"]


def variant_of(content: Any, path: str) -> str:
    """The variant whose depths and widths a published file has.

    Variants that differ only in their windows have the same weights: of these, the one whose image size stands in the
    file's name, else the first in VARIANTS.
    """
    state = find_weights(content, path)
    blocks = {tuple(name.split(".")[1:4:2]) for name in state if name.startswith("levels.") and ".blocks." in name}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(4))
    dim = state["patch_embed.conv_down.3.weight"].shape[0] if "patch_embed.conv_down.3.weight" in state else 0
    fitting = [name for name, v in VARIANTS.items() if tuple(v.depths) == depths and v.dim == dim]
    if not fitting:
        raise ValueError(f"{path} fits no known variant (depths {depths}, dim {dim}); say which with model=NAME")
    named = [name for name in fitting if str(VARIANTS[name].image_size) in Path(path).name]
    return (named or fitting)[0]


def score(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate, print, write the JSON file and, if asked for, the predictions. Returns what the JSON file holds."""
    world = distributed.init_world(cfg.device)
    distributed.check_same_devices(world)
    precision = resolve_precision(cfg.precision, world)
    if not world.is_main:  # every rank lists the same folders; one of them may say that images are missing
        logging.getLogger("data.variants").setLevel(logging.ERROR)
    path = find_file(cfg.checkpoint)
    distributed.on_main(world, lambda: checkpoint.refuse_damaged(path))
    content = read_checkpoint(path)
    loader = data.build_eval_loader(
        cfg.data, batch_size=cfg.batch_size, rank=world.rank, world_size=world.world_size, split=cfg.eval_set
    )
    models = load_models(cfg, content, path, world.device)
    check_classes(content, models, loader, cfg, world)
    check_answers(loader, cfg)
    out, table = output_files(cfg, path, content, world)
    # Of the moving average, where there is one: its score is what counts.
    answers = Predictions(list(models)[-1], loader)
    transform = BatchTransform(AugmentConfig(), cfg.data.mean, cfg.data.std, loader.num_classes, seed=0)
    autocast = autocast_context(precision, world.device)
    result = evaluate(
        models,
        loader,
        prepare=transform.normalise,
        autocast=autocast,
        world=world,
        answered=answers.add if table else None,
    )
    loader.close()
    record = {
        "checkpoint": str(path),
        "model": cfg.model.name,
        "eval_set": cfg.eval_set,
        "data": cfg.data.path or cfg.data.source,
        "precision": precision,
        **{key: getattr(cfg.data, key) for key in _IMPLIED_DATA},
        **result,
        **({"predictions": str(table), "predictions_of": "ema" if answers.prefix else "model"} if table else {}),
    }
    if world.is_main:
        report(record, models)
        write_atomically(out, json.dumps(record, indent=1) + "\n")
        print(f"written to {out}")
    if table is not None:
        answers.write(table, world)
    return record


def output_files(cfg: EvalConfig, path: Path, content: Any, world: World) -> tuple[Path, Path | None]:
    """(scores, predictions or None), both found writable before the evaluation and not after it. Collective."""
    out = Path(cfg.out).expanduser() if cfg.out else scores_file(path, content, cfg)
    distributed.on_main(world, lambda: check_writable(out))
    table = Path(cfg.predictions).expanduser() if cfg.predictions else None
    if table is not None:
        distributed.on_main(world, lambda: check_predictions(table, out))
    return out, table


def scores_file(path: Path, content: Any, cfg: EvalConfig) -> Path:
    """Beside the checkpoint, named by the set and by what differs from the checkpoint's own evaluation.

    The scores at another image size or on other data do not replace those that are there.
    """
    own = content.get("config") if isinstance(content, dict) else None
    if not isinstance(own, dict):
        own = asdict(EvalConfig(model=ModelConfig(cfg.model.name)))
        own["data"] |= {key: getattr(VARIANTS[cfg.model.name], key) for key in _PUBLISHED_SCORING}
    source = ("source",) if cfg.eval_set == "val" else ()  # other sets bring theirs
    keys = {"data": (*source, "path", *_IMPLIED_DATA), "model": ("name", *_IMPLIED_MODEL)}
    settings = [f"precision={cfg.precision}"] if cfg.precision != "auto" else []
    for group, names in keys.items():
        now = asdict(getattr(cfg, group))
        settings += [f"{group}.{k}={now[k]}" for k in names if plain(now[k]) != plain(own[group].get(k))]
    return path.with_name(f"{path.name}.{point_name([cfg.eval_set, *settings])}.eval.json")


def check_classes(
    content: Any, models: dict[str, torch.nn.Module], loader: EvalLoader, cfg: EvalConfig, world: World
) -> None:
    """Raises ValueError where the model was trained for another number of classes, or for the same in another order.

    Where no class of both has two numbers, differing names may be new names: that is said, and scored.
    """
    head = next(iter(models.values())).head
    width = head.out_features if isinstance(head, torch.nn.Linear) else 0
    config = content.get("config") if isinstance(content, dict) else None
    # A head may be wider than its data.
    trained = config.get("num_classes", width) if isinstance(config, dict) else width
    if trained != loader.num_classes:
        raise ValueError(
            f"the checkpoint's model was trained for {trained} classes, {cfg.data.path or cfg.data.source} "
            f"({cfg.eval_set}) has {loader.num_classes}; give the data it was trained for (class folders are numbered "
            "by the train/ beside them)"
        )
    names = config.get("class_names") if isinstance(config, dict) else None
    if difference := first_difference(names, loader.class_names):
        where = f"{cfg.data.path or cfg.data.source} ({cfg.eval_set})"
        message = f"the checkpoint's model was trained on other classes than those of {where}: "
        if renumbered(names, loader.class_names):
            raise ValueError(f"{message}{difference}; give the data it was trained for")
        if world.is_main:
            print(f"warning   {message}{difference}; are these new names for the same classes?")


def check_answers(loader: EvalLoader, cfg: EvalConfig) -> None:
    """Raises ValueError where ReaL's answers and the data number classes differently. Other sets bring their data."""
    if cfg.eval_set == "imagenet_real" and loader.num_classes != _REAL_CLASSES:
        raise ValueError(
            f"eval_set=imagenet_real has answers among ImageNet's {_REAL_CLASSES} classes, the data has "
            f"{loader.num_classes}; give data.path=DIR of the whole validation set"
        )


def check_predictions(table: Path, out: Path) -> None:
    """Raises ValueError where the predictions would replace a file, or cannot be written."""
    check_writable(table, "predictions=FILE.csv")
    if table.exists():
        raise ValueError(f"{table} exists already; remove it, or give another file with predictions=FILE.csv")
    if table.absolute() == out.absolute():
        raise ValueError(f"{table} is where the scores go; give another file with predictions=FILE.csv")


def check_writable(out: Path, setting: str = "out=FILE") -> None:
    """Raises ValueError where the file, or its directory, cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(21, "is a directory")
        write_atomically(out.with_name(f"{out.name}.writable"), "")
        out.with_name(f"{out.name}.writable").unlink()
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; give another file with {setting}") from error


def load_models(cfg: EvalConfig, content: Any, path: Path, device: torch.device) -> dict[str, torch.nn.Module]:
    """Prefix -> model: the weights, and the moving average where the file holds one."""
    has_ema = isinstance(content, dict) and isinstance(content.get("ema"), dict)
    models = {}
    kinds = {"": "model", "ema_": "ema"} if has_ema else {"": "model"}
    for prefix, weights in kinds.items():
        state = find_weights(content, path, weights=weights)
        m = cfg.model
        model = create_model(
            m.name,
            num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
            init=m.init,
            window_padding=m.window_padding,
            scan_backend=m.scan_backend,
            **m.architecture,
        )
        load_weights(model, state, path)
        model = model.to(device).eval()
        models[prefix] = model.to(memory_format=torch.channels_last) if cfg.channels_last else model
    return models


def report(record: dict[str, Any], models: dict[str, torch.nn.Module]) -> None:
    print(
        f"{record['checkpoint']}: {record['model']}, {record['images']:,} images of {record['eval_set']} at "
        f"{record['image_size']} px (crop_pct {record['crop_pct']}, {record['crop_mode']}), {record['precision']}"
    )
    for prefix in models:
        name = "EMA weights" if prefix else "weights"
        print(
            f"  {name:<12} Top-1 {record[f'{prefix}top1']:.3f} %  Top-5 {record[f'{prefix}top5']:.3f} %  "
            f"loss {record[f'{prefix}loss']:.4f}"
        )
        if f"{prefix}mce" in record:
            print(f"  {'':<12} mCE {record[f'{prefix}mce']:.3f} % (of AlexNet's errors)")
    if record["eval_set"] == "imagenet_c" and "mce" not in record:
        print("  no mCE: it takes all 15 corruptions at severities 1 to 5, and not all are here")
    print(f"  {record['img_per_sec']:,.0f} img/s")
