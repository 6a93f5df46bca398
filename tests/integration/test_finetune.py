"""Fine-tuning: weights of other classes on one's own folder, and rates that fall from the head to the stem."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambavision.compose import compose_train_config
from mambavision.engine import checkpoint
from mambavision.engine.session import run
from mambavision.optim import OPTIMIZERS
from mambavision.telemetry.sinks import read_events
from tests.integration.torchrun import train as torchrun
from tests.unit.data_samples import make_folder

TINY = [
    "experiment=tiny",
    "logger=jsonl",
    "logger.console=off",
    "schedule.warmup_epochs=0",
    "trainer.log_every_steps=1",
]


def train(directory: Path, name: str, *overrides: str) -> dict:
    """The state of the last checkpoint of a run (continued, if it is there)."""
    status = run(compose_train_config([*TINY, f"output_dir={directory}", f"run_name={name}", *overrides]))
    return checkpoint.load(checkpoint.list_checkpoints(directory / name / "checkpoints")[-1]) | {"status": status}


@pytest.mark.slow
def test_weights_of_ten_classes_are_fine_tuned_on_a_folder_of_three(tmp_path: Path):
    start = train(tmp_path, "start", "trainer.max_steps=2")
    folder = make_folder(tmp_path / "images", train=24, val=7)
    shape = ["dim=16", "in_dim=8", "depths=[1,1,2,2]", "num_heads=[1,1,2,2]"]
    words = ["experiment=finetune", "model=mambavision_nano", *(f"model.architecture.{word}" for word in shape)]
    words += [f"model.checkpoint={tmp_path / 'start'}", "data=folder", f"data.path={folder}", "data.num_workers=1"]
    words += ["trainer=cpu", "trainer.global_batch_size=8", "trainer.micro_batch_size=8", "trainer.max_steps=6"]
    words += ["logger=jsonl", "logger.console=off", f"output_dir={tmp_path}", "run_name=x", "trainer.threads=1"]
    assert run(compose_train_config(words))["status"] == "finished"
    tuned = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "x" / "checkpoints")[-1])
    assert tuned["model"]["head.weight"].shape == (3, 128)
    stem = "patch_embed.conv_down.0.weight"
    moved = (tuned["model"][stem] - start["model"][stem]).abs().max()
    assert 0 < moved < 1e-3, "it began there, and its rate is small"
    events = read_events(tmp_path / "x" / "metrics.jsonl")
    (begun,) = (e for e in events if e["event"] == "start")
    assert "fresh head" in begun["began_from"] and begun["num_classes"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_layer_learns_at_its_share_of_the_rate_that_is_logged(optimizer: str, tmp_path: Path):
    state = train(tmp_path, "x", f"optimizer={optimizer}", "optimizer.layer_decay=0.001", "trainer.max_steps=3")
    (*_, logged) = (e for e in read_events(tmp_path / "x" / "metrics.jsonl") if e["event"] == "train")
    groups = state["optimizer"]["param_groups"]
    assert len(groups) == 16 and groups[-1]["lr"] == logged["optimizer.lr"] > 0  # 6 blocks, stem and head, each twice
    assert all(group["lr"] == logged["optimizer.lr"] * group["lr_scale"] for group in groups)
    plain = train(tmp_path, "plain", f"optimizer={optimizer}", "trainer.max_steps=3")
    start = train(tmp_path, "start", f"optimizer={optimizer}", "trainer.max_steps=1", "optimizer.lr=1e-30",
                  "schedule.min_lr=0")  # fmt: skip
    stem = "patch_embed.conv_down.0.weight"
    assert not torch.equal(plain["model"][stem], start["model"][stem])
    assert torch.equal(state["model"][stem], start["model"][stem]), "1e-21 of the rate changes no float32"
    assert not torch.equal(state["model"]["head.weight"], start["model"]["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_with_layer_decay_arrives_at_the_same_bits(optimizer: str, tmp_path: Path):
    words = [f"optimizer={optimizer}", "optimizer.layer_decay=0.7"]
    whole = train(tmp_path, "whole", *words, "trainer.max_steps=6")
    train(tmp_path, "parts", *words, "trainer.max_steps=3")
    resumed = train(tmp_path, "parts", *words, "trainer.max_steps=6")
    assert resumed["status"]["step"] == 6
    for kind in ("model", "ema"):
        for name, value in whole[kind].items():
            assert torch.equal(value, resumed[kind][name]), name
    assert str(resumed["optimizer"]["param_groups"]) == str(whole["optimizer"]["param_groups"])


@pytest.mark.slow
def test_a_layer_decay_of_one_is_none_bit_for_bit(tmp_path: Path):
    off = train(tmp_path, "off", "trainer.max_steps=4")
    one = train(tmp_path, "one", "trainer.max_steps=4", "optimizer.layer_decay=1")
    assert all(torch.equal(value, one["model"][name]) for name, value in off["model"].items())
    assert [list(g) for g in off["optimizer"]["param_groups"]] == [list(g) for g in one["optimizer"]["param_groups"]]
    assert "lr_scale" not in off["optimizer"]["param_groups"][0]


@pytest.mark.slow
def test_turning_layer_decay_on_in_a_run_is_answered_with_what_to_do(tmp_path: Path):
    train(tmp_path, "x", "trainer.max_steps=2")
    with pytest.raises(ValueError, match="optimizer.layer_decay: None -> 0.8"):
        train(tmp_path, "x", "optimizer.layer_decay=0.8")
    with pytest.raises(ValueError, match="its parameters in other groups"):
        train(tmp_path, "x", "optimizer.layer_decay=0.8", "resume.allow=[optimizer.layer_decay]")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_behind_a_frozen_backbone_the_head_alone_learns(precision: str, tmp_path: Path):
    """Also where BatchNorm's statistics are averaged over accumulated micro-batches, and with stochastic depth."""
    start = train(tmp_path, "start", "trainer.max_steps=5")
    words = [f"model.checkpoint={tmp_path / 'start'}", "model.freeze=backbone", f"trainer.precision={precision}"]
    words += [
        "model.drop_path=0.5",
        "trainer.max_steps=5",
        "optimizer.layer_decay=0.5",
        "trainer.grad_checkpointing=true",
    ]
    frozen = train(tmp_path, "frozen", *words)
    for kind in ("model", "ema"):
        changed = {name for name, value in frozen[kind].items() if not torch.equal(value, start["model"][name])}
        assert changed == {"head.weight", "head.bias"}
    assert [g["param_names"] for g in frozen["optimizer"]["param_groups"]] == [["head.weight"], ["head.bias"]]


@pytest.mark.slow
def test_a_frozen_backbone_on_two_ranks_trains_the_head_of_one_and_resumes(tmp_path: Path):
    start = train(tmp_path, "start", "trainer.max_steps=5")
    words = [*TINY, f"model.checkpoint={tmp_path / 'start'}", "model.freeze=backbone", f"output_dir={tmp_path}"]
    for name, ranks, steps in (("one", 1, 6), ("two", 2, 3), ("two", 2, 6)):
        done = torchrun(*words, f"run_name={name}", f"trainer.max_steps={steps}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (
        checkpoint.load(checkpoint.list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("one", "two")
    )
    assert one["progress"]["step"] == two["progress"]["step"] == 6
    for name, value in two["model"].items():
        if name.startswith("head."):
            torch.testing.assert_close(value, one["model"][name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, start["model"][name]), name
    norms = [
        [e["train/grad_norm"] for e in read_events(tmp_path / name / "metrics.jsonl") if e["event"] == "train"]
        for name in ("one", "two")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
