"""Weights from files: what loads, what is refused, and what the refusal says."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch

from mambavision import create_model
from mambavision.compose import compose_train_config
from mambavision.distributed import World
from mambavision.engine.build import build_model
from mambavision.engine.checkpoint import checkpoint_path, sidecar
from mambavision.models.pretrained import load_weights
from mambavision.run_dir import run_name

SHAPE = {"dim": 8, "in_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": (4, 2)}


def build(**keywords):
    return create_model("mambavision_t", **{"num_classes": 5, **SHAPE, **keywords})


@pytest.fixture
def source():
    torch.manual_seed(1)
    return build()


def assert_same_weights(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


def save(directory: Path, content) -> Path:
    path = directory / "weights.pth.tar"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "model.", "module.encoder."])
@pytest.mark.parametrize("nesting", [None, "state_dict", "model"])
def test_every_nesting_and_prefix_loads_with_no_key_left_over(tmp_path, source, nesting, prefix):
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = save(tmp_path, state if nesting is None else {nesting: state, "epoch": 3})
    assert_same_weights(build(checkpoint=path), source.state_dict())


def test_a_published_file_with_its_command_line_beside_the_weights_loads(tmp_path, source):
    arguments = argparse.Namespace(lr=0.005, opt="lamb", lists=[1, 2], nothing=None)
    path = save(
        tmp_path, {"state_dict": source.state_dict(), "args": arguments, "optimizer": {"state": {}}, "epoch": 309}
    )
    assert_same_weights(build(checkpoint=path), source.state_dict())


def test_our_own_checkpoint_gives_raw_weights_or_the_moving_average(tmp_path, source):
    average = {name: value + 1 for name, value in source.state_dict().items()}
    path = save(tmp_path, {"model": source.state_dict(), "ema": average, "optimizer": {}, "progress": {"step": 3}})
    assert_same_weights(build(checkpoint=path), source.state_dict())
    assert_same_weights(build(checkpoint=path, weights="ema"), average)
    with pytest.raises(ValueError, match="no moving average under 'ema' or 'state_dict_ema'; use weights='model'"):
        build(checkpoint=save(tmp_path, {"model": source.state_dict()}), weights="ema")


def test_a_file_of_timms_saver_gives_its_moving_average(tmp_path, source):
    average = {name: value + 1 for name, value in source.state_dict().items()}
    path = save(tmp_path, {"state_dict": source.state_dict(), "state_dict_ema": average, "version": 2})
    assert_same_weights(build(checkpoint=path), source.state_dict())
    assert_same_weights(build(checkpoint=path, weights="ema"), average)


def test_weights_of_a_model_that_timm_froze_in_part_load(tmp_path, source):
    """The layers that stand in for BatchNorm there keep no count of batches."""
    timm.utils.freeze(source, ["patch_embed", "levels.0"])
    state = source.state_dict()
    assert state.keys() < build().state_dict().keys()
    model = build(checkpoint=save(tmp_path, {"state_dict": state}))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_run_directory_stands_for_its_best_checkpoint(tmp_path, source):
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    for step, score in ((1, 50.0), (2, 70.0), (3, 60.0)):
        weights = {name: value + step for name, value in source.state_dict().items()}
        average = {name: value - step for name, value in source.state_dict().items()}
        torch.save({"model": weights, "ema": average}, checkpoint_path(directory, step))
        sidecar(checkpoint_path(directory, step)).write_text(json.dumps({"score": score, "samples_seen": step}))
    for path in (tmp_path / "run", directory):
        raw, ema = build(checkpoint=path), build(checkpoint=path, weights="ema")
        assert torch.equal(raw.norm.weight, source.norm.weight + 2) and torch.equal(
            ema.norm.weight, source.norm.weight - 2
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is a directory without checkpoints; give a run directory or a file"):
        build(checkpoint=tmp_path / "empty")


def test_training_starts_from_the_weights_that_were_named_and_is_then_another_run(tmp_path, source):
    average = {name: value + 1 for name, value in source.state_dict().items()}
    path = save(tmp_path, {"model": source.state_dict(), "ema": average})
    shape = [f"model.architecture.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in SHAPE.items()]
    given = ["data=synthetic", "model=mambavision_t", "trainer=cpu", "data.num_classes=5", *shape]
    given += [f"model.checkpoint={path}", "model.checkpoint_weights=model"]
    raw, ema = compose_train_config(given), compose_train_config([*given[:-1], "model.checkpoint_weights=ema"])
    world = World(0, 1, 0, 1, torch.device("cpu"))
    assert_same_weights(build_model(raw, 5, str(path), world), source.state_dict())
    assert_same_weights(build_model(ema, 5, str(path), world), average)
    assert run_name(raw) != run_name(ema)
    with pytest.raises(ValueError, match=r"has 5 classes, the model 7; .*model.replace_head=true"):
        build_model(raw, 7, str(path), world)


def test_safetensors_load(tmp_path, source):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({f"model.{name}": value.contiguous() for name, value in source.state_dict().items()}, path)
    assert_same_weights(build(checkpoint=path), source.state_dict())


def test_timm_loads_the_same_file(tmp_path, source):
    path = save(tmp_path, {"state_dict": source.state_dict()})
    assert_same_weights(
        timm.create_model("mambavision_t", num_classes=5, checkpoint_path=str(path), **SHAPE), source.state_dict()
    )


class Intruder:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path, source, capsys):
    path = save(tmp_path, {"state_dict": source.state_dict(), "args": Intruder()})
    with pytest.raises(ValueError, match=r"not loaded because that could run code.*re-save"):
        build(checkpoint=path)
    assert "must never run" not in capsys.readouterr().out


def test_a_wrong_head_size_is_an_error_that_names_both_ways_out(tmp_path, source):
    path = save(tmp_path, {"state_dict": source.state_dict()})
    with pytest.raises(ValueError, match=r"has 5 classes, the model 7; .*replace_head=True, or num_classes=5"):
        build(checkpoint=path, num_classes=7)
    model = build(checkpoint=path, num_classes=7, replace_head=True)
    assert model.head.weight.shape == (7, 64) and model.head.weight.std() > 0
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert torch.equal(model.levels[3].blocks[0].mixer.A_log, source.levels[3].blocks[0].mixer.A_log)
    other = build(checkpoint=path, num_classes=5, replace_head=True)
    assert not torch.equal(other.head.weight, source.head.weight), "five other classes"


def test_weights_of_another_network_are_listed_and_the_right_one_is_named(tmp_path, source):
    path = save(tmp_path, {"state_dict": source.state_dict()})
    with pytest.raises(ValueError) as refused:
        build(checkpoint=path, depths=(1, 1, 3, 2), layer_scale=1e-5)
    text = str(refused.value)
    assert "missing in the file" in text and "levels.2.blocks.0.gamma_1" in text and "... and" in text
    assert "depths (1, 1, 2, 2) and dim 8" in text and "layer_scale=None" in text
    with pytest.raises(ValueError, match=r"of another shape:[\s\S]*conv_down.0.weight is \(8, 3, 3, 3\) in the file"):
        build(checkpoint=path, in_dim=16)


def test_a_missing_key_is_an_error_and_nothing_is_half_loaded(source):
    state = source.state_dict()
    del state["norm.running_var"]
    state["stray"] = torch.zeros(1)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 missing in the file:\s+norm.running_var\s+1 not in the model:\s+stray"):
        load_weights(model, state)
    assert_same_weights(model, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "no tensors"),
        ([1, 2], "holds a list, not a dict"),
        ({"fc.weight": torch.zeros(2, 2)}, "has no head, the model 5"),
    ],
)
def test_a_file_without_our_weights_says_so(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        build(checkpoint=save(tmp_path, content))


def test_absent_and_cut_files_are_told_apart(tmp_path, source):
    with pytest.raises(ValueError, match="does not exist"):
        build(checkpoint=tmp_path / "nowhere.pt")
    path = save(tmp_path, source.state_dict())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* cut short"):
        build(checkpoint=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pt", b"trainer:\n  epochs: 3\n", r"is not a checkpoint \(it begins with b'trainer:.*fetch it again"),
        ("weights.pth", b"hello there\n", "is not a checkpoint"),
        ("weights.pth.tar", b"<!DOCTYPE html><title>404</title>", "is not a checkpoint .*<!DOCTYPE"),
        ("weights.pt", b"", r"is not a checkpoint \(it is empty\)"),
        ("weights.pt", b"\x80\x02\x8a", "weights.pt"),
        ("weights.safetensors", b"", r"cannot be read .*fetch it again"),
        ("weights.safetensors", b"<!DOCTYPE html><title>404</title>", r"cannot be read .*fetch it again"),
    ],
)
def test_a_file_of_another_kind_is_refused_without_a_word_of_unsafe_loading(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        build(checkpoint=path)
    assert "weights_only=False" not in str(refused.value)


def test_weights_for_other_input_channels_name_in_chans(tmp_path):
    path = save(tmp_path, build(in_chans=1).state_dict())
    with pytest.raises(ValueError, match=r"conv_down.0.weight is \(8, 1, 3, 3\)[\s\S]*: pass in_chans=1$"):
        build(checkpoint=path)
