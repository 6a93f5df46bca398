"""Weights from files: published checkpoints, our own, bare state dicts, safetensors. Strict, and no code is loaded.

Names are the published ones, so there is no key map; only nesting and prefixes are taken off.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NESTING_KEYS = ("state_dict", "model")  # where files keep their weights; none of them: the file is the weights
PREFIXES = ("module.", "encoder.", "model.", "_orig_mod.")
LISTED_KEYS = 8  # a message names this many keys of a kind and counts the rest
SAVED_STARTS = (b"PK", b"\x80")  # what torch.save writes: a zip archive, or pickles in its old format
STEM = "patch_embed.conv_down.0.weight"  # (in_dim, in_chans, 3, 3)


def load_checkpoint(model: nn.Module, path: str | Path, *, weights: str = "model", replace_head: bool = False) -> None:
    """Fill a model from a checkpoint file, every parameter and buffer of it.

    Args:
        path: .pt, .pth, .pth.tar or .safetensors, or the directory of a run of ours (`find_file`).
        weights: "model", or "ema" for the moving average that our checkpoints keep beside the weights.
        replace_head: keep the model's fresh head: for other classes, be there as many or not.

    Raises:
        ValueError: unreadable or refused file, or weights that do not fit, listed with what to do.
    """
    path = find_file(path)
    load_weights(model, find_weights(read_checkpoint(path), path, weights=weights), path, replace_head=replace_head)


def find_file(path: str | Path) -> Path:
    """The file itself; of a directory of a run (or its checkpoints/) the checkpoint that scored best, else the newest.

    Raises:
        ValueError: a directory without checkpoints.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return directory
    from mambavision.engine.checkpoint import best_of, list_checkpoints

    files = list_checkpoints(directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory)
    if not files:
        raise ValueError(f"checkpoint={path} is a directory without checkpoints; give a run directory or a file")
    return best_of(files) or files[-1]


def read_checkpoint(path: str | Path) -> Any:
    """The content of a checkpoint file on the CPU. Unpickles nothing but tensors, containers and argparse.Namespace."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"checkpoint {str(path)!r} does not exist; give the path of a .pt, .pth.tar or .safetensors file"
        )
    if path.suffix != ".safetensors":
        _refuse_other_formats(path)
    try:
        return _load_file(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {str(path)!r} holds objects other than tensors and plain containers, which are not loaded "
            f"because that could run code: {_first_line(error)}. If you trust it, re-save its weights alone: "
            "torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH)"
        ) from error
    except Exception as error:  # what the loaders raise for damaged content is not documented
        raise _unreadable(path, error) from error


def _refuse_other_formats(path: Path) -> None:
    """Text, YAML or the page of a failed download: torch.load takes any of them for an unsafe or broken pickle."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not start.startswith(SAVED_STARTS):
        found = f"it begins with {start!r}" if start else "it is empty"
        raise ValueError(f"{str(path)!r} is not a checkpoint ({found}); fetch it again")


def _load_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # timm's savers, and so the published files, keep the command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"checkpoint {str(path)!r} cannot be read ({_first_line(error)}); it may be cut short: fetch it again"
    )


def find_weights(content: Any, path: str | Path, *, weights: str = "model") -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, nesting and name prefixes taken off."""
    if weights not in ("model", "ema"):
        raise ValueError(f"weights {weights!r}: choose 'model' or 'ema'")
    state = content
    if weights == "ema":
        # Under the second name timm's saver keeps it.
        found = [content.get(key) for key in ("ema", "state_dict_ema")] if isinstance(content, dict) else []
        averages = [average for average in found if isinstance(average, dict)]
        if not averages:
            raise ValueError(
                f"checkpoint {str(path)!r} holds no moving average under 'ema' or 'state_dict_ema'; use weights='model'"
            )
        state = averages[0]
    for key in NESTING_KEYS * 2:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(state).__name__}, not a dict of weights")
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"checkpoint {str(path)!r} holds no tensors under {', '.join(NESTING_KEYS)} or at its top")
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name[len(prefix) :]: value for name, value in state.items()}
                stripped = True
    return state


def load_weights(
    model: nn.Module, state: dict[str, Tensor], path: str | Path = "state dict", *, replace_head: bool = False
) -> None:
    """Copy a state dict into a model, strictly. `path` is for messages alone."""
    own = model.state_dict()
    classes, wanted = _classes(state), _classes(own)
    if classes != wanted and not replace_head:
        raise ValueError(_head_advice(path, classes, wanted))
    if replace_head:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state.update({name: value for name, value in own.items() if name.startswith("head.")})
    # No output depends on BatchNorm's count of batches, and layers that timm.utils.freeze has replaced keep none.
    counts = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")}
    state = {**counts, **state}
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or misshapen:
        lines = [f"checkpoint {str(path)!r} does not fit the model:"]
        lines += _listed("missing in the file", missing)
        lines += _listed("not in the model", unexpected)
        lines += _listed("of another shape", misshapen)
        lone = len(misshapen) == 1 and not missing and not unexpected
        lines.append((lone and _in_chans_advice(state, own)) or _fit_advice(state, missing, unexpected))
        raise ValueError("\n".join(lines))
    model.load_state_dict(state, strict=True)


def _classes(state: dict[str, Tensor]) -> int:
    return state["head.weight"].shape[0] if "head.weight" in state else 0


def _head_advice(path: str | Path, classes: int, wanted: int) -> str:
    has = f"has {classes} classes" if classes else "has no head"
    return (
        f"checkpoint {str(path)!r} {has}, the model {wanted}; to start a fresh head type model.replace_head=true "
        f"(create_model: replace_head=True, or num_classes={classes} to keep the head)"
    )


def _in_chans_advice(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """For a file whose only misfit is one shape: what to pass if that is the stem's input channels, else ''."""
    if STEM not in own or state[STEM].ndim != 4 or state[STEM].shape[1] == own[STEM].shape[1]:
        return ""
    channels = state[STEM].shape[1]
    return f"the file is of a model for images of {channels} channels: pass in_chans={channels}"


def _fit_advice(state: dict[str, Tensor], missing: list[str], unexpected: list[str]) -> str:
    depths = [
        len({name.split(".")[3] for name in state if name.startswith(f"levels.{stage}.blocks.")}) for stage in range(4)
    ]
    if not any(depths):
        return "its names are not those of a MambaVision; is it the right file?"
    stem = state.get("patch_embed.conv_down.3.weight")
    width = f" and dim {stem.shape[0]}" if stem is not None else ""
    advice = f"the file is of a model with depths {tuple(depths)}{width}: create that variant"
    if any("gamma" in name for name in unexpected):
        advice += "; it has layer scales (layer_scale=1e-5, or layer_scale_conv in stages 1, 2)"
    if any("gamma" in name for name in missing):
        advice += "; it has no layer scales (layer_scale=None)"
    return advice


def _listed(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"    ... and {len(entries) - LISTED_KEYS} more"] if len(entries) > LISTED_KEYS else []
    return [f"  {len(entries)} {title}:", *(f"    {entry}" for entry in entries[:LISTED_KEYS]), *more]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
