"""Every experiment composes and trains: two steps of its own recipe, on synthetic images and a shrunken network."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambavision.compose import compose_train_config, group_choices
from mambavision.engine.losses import blind_guess
from mambavision.engine.session import run
from mambavision.telemetry.sinks import read_events

ROOT = Path(__file__).resolve().parents[2]
SHRUNK = [
    "data=synthetic",
    "data.num_classes=10",
    "data.image_size=32",
    "data.synthetic_train_samples=16",
    "data.synthetic_eval_samples=5",
    "model.architecture.dim=8",
    "model.architecture.in_dim=8",
    "model.architecture.depths=[1,1,2,2]",
    "model.architecture.num_heads=[1,1,2,2]",
    "trainer=cpu",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.max_steps=2",
    "trainer.log_every_steps=1",
    "trainer.threads=1",
    "logger=jsonl",
    "logger.console=off",
]


@pytest.mark.parametrize("experiment", group_choices("experiment"))
def test_experiment_takes_two_steps(experiment: str, tmp_path: Path):
    # An experiment has the last word over groups, so what is shrunk is given key by key.
    overrides = [o for o in SHRUNK if o != "trainer=cpu"] + ["trainer.device=cpu"]
    if experiment.startswith("ablation/pattern"):  # the pattern spells out T's eight and four blocks
        overrides.append("model.architecture.depths=[1,1,8,4]")
    if experiment == "finetune":  # begins from weights; from the first run's
        run(compose_train_config([*overrides, f"output_dir={tmp_path}", "run_name=start"]))
        overrides.append(f"model.checkpoint={tmp_path / 'start'}")
    cfg = compose_train_config([f"experiment={experiment}", *overrides, f"output_dir={tmp_path}", "run_name=x"])
    status = run(cfg)
    assert (status["status"], status["step"]) == ("finished", 2)
    losses = [e["train/loss"] for e in read_events(tmp_path / "x" / "metrics.jsonl") if e["event"] == "train"]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


def test_mesa_adds_its_loss_after_its_start(tmp_path: Path):
    base = [*SHRUNK, "trainer.epochs=2", "schedule.warmup_epochs=0", "trainer.max_steps=4", f"output_dir={tmp_path}"]
    run(compose_train_config([*base, "run_name=plain"]))
    run(compose_train_config([*base, "run_name=mesa", "trainer.mesa.weight=1.0", "trainer.mesa.start_fraction=0.4"]))
    plain, mesa = (
        [e for e in read_events(tmp_path / name / "metrics.jsonl") if e["event"] == "train"]
        for name in ("plain", "mesa")
    )
    for before in (0, 1):  # epoch 0 of 2: 0 > 0.4 does not hold
        assert plain[before]["train/loss"] == mesa[before]["train/loss"]
        assert "train/mesa_loss" not in mesa[before]
    assert mesa[2]["train/mesa_loss"] > 0
    assert mesa[2]["train/loss"] - mesa[2]["train/mesa_loss"] == pytest.approx(plain[2]["train/loss"], rel=1e-6)


def test_a_strong_mesa_is_not_taken_for_a_collapse(tmp_path: Path):
    """A blind guess is known by its cross-entropy, which the distance to the moving average is no part of."""
    words = ["experiment=tiny", "logger=jsonl", "logger.console=off", f"output_dir={tmp_path}", "run_name=x"]
    words += ["trainer.mesa.weight=6", "trainer.log_every_steps=3", "trainer.threads=1"]
    assert run(compose_train_config(words))["status"] == "finished"
    losses = [e["train/loss"] for e in read_events(tmp_path / "x" / "metrics.jsonl") if e["event"] == "train"]
    assert max(losses[5:]) > 2.3026, "else this shows nothing: ln 10 is the loss of a blind guess"


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["light", "imagenet"])
def test_binary_cross_entropy_learns(augment: str, tmp_path: Path):
    words = ["experiment=tiny", "logger=jsonl", "logger.console=off", f"output_dir={tmp_path}", "run_name=x"]
    words += ["optimizer=adamw", "optimizer.lr=0.01", "augment.auto_augment=none", "trainer.log_every_steps=1"]
    words += ["trainer.loss=bce", f"augment={augment}", "trainer.epochs=8"]
    words += [] if augment == "light" else ["trainer.bce_threshold=0.2", "guard.collapse_loss_margin=0"]
    status = run(compose_train_config(words))
    losses = [e["train/loss"] for e in read_events(tmp_path / "x" / "metrics.jsonl") if e["event"] == "train"]
    assert losses[0] == pytest.approx(math.log(2), rel=0.1), "ten coins tossed an image, and the mean of them"
    assert losses[-1] < blind_guess("bce", 10) * (1 if augment == "light" else 2)
    assert status["eval/top1"] > 50, "chance is 10"


def test_compiled_steps_give_the_losses_of_eager_ones(tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        drawn_alike = ["model.drop_path=0", "trainer.precision=fp32", f"trainer.compile={compiled}"]
        run(compose_train_config([*SHRUNK, *drawn_alike, f"output_dir={tmp_path}", f"run_name={compiled}"]))
        events = read_events(tmp_path / compiled / "metrics.jsonl")
        losses.append([e["train/loss"] for e in events if e["event"] == "train"])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_compilation_that_fails_is_answered_with_what_to_type(tmp_path: Path) -> None:
    arguments = [*SHRUNK, "trainer.compile=true", f"output_dir={tmp_path}", "run_name=run"]
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    result = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "torch.compile failed" in result.stderr and "type trainer.compile=false" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["refused"]
