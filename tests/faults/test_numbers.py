"""Losses and gradients that are not finite, and models that collapse."""

from __future__ import annotations

import json

import pytest
import torch

from mambavision.engine import checkpoint
from tests.faults.harness import STEPS, Trainer, newest, state_hash, valid_steps

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(train: Trainer, kind: str) -> None:
    """nan: the loss of rank 1 is nan. inf: its loss is finite, its gradient is not."""
    training = train.run("run", "trainer.max_steps=12", fault=f"{kind}@9:1")
    assert training.code == 0
    (refused,) = training.events("refused")
    assert refused["steps"] == [9]
    assert refused["ranks"] == ([1] if kind == "nan" else [])
    samples = json.loads((training.directory / "nonfinite/step_00000009.json").read_text())["samples_by_rank"]
    assert {len(s) for s in samples.values()} == {8}
    assert sorted(samples) == (["1"] if kind == "nan" else ["0", "1"])
    state = checkpoint.load(newest(training.directory))
    assert all(torch.isfinite(t).all() for part in ("model", "ema") for t in state[part].values())
    assert state["optimizer"]["param_groups"][0]["step"] == 11, "eleven of twelve steps were taken"


def test_a_refused_step_leaves_weights_ema_and_batch_norm_as_they_were(train: Trainer) -> None:
    train.run("without", "trainer.max_steps=9", "checkpoint.every_steps=1", ranks=2)
    train.run("refused", "trainer.max_steps=10", "checkpoint.every_steps=1", ranks=2, fault="nan@9:0")
    before = checkpoint.load(newest(train.output_dir / "without"))
    after = checkpoint.load(newest(train.output_dir / "refused"))
    for part in ("model", "ema"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part]), part


def test_steps_that_stay_not_finite_roll_back_once_and_go_on_after_them(train: Trainer) -> None:
    settings = ("guard.max_skipped_steps=3", "guard.max_rollbacks=1")
    training = train.run("run", *settings, fault="nan@11-14:0")
    assert training.code == 0
    (rollback,) = training.events("rollback")
    assert rollback["to"] == "step_00000010.pt"
    assert "from step 11 on" in rollback["cause"]
    assert training.status["step"] == STEPS
    assert valid_steps(training.directory)[-1] == STEPS
    progress = checkpoint.load(newest(training.directory))["progress"]
    assert progress == {"step": STEPS, "samples_seen": STEPS * 16}, "the data goes on where it was"


def test_the_second_time_the_run_fails_and_keeps_its_good_checkpoints(train: Trainer) -> None:
    settings = (
        "guard.max_skipped_steps=3",
        "guard.max_rollbacks=1",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
    )
    training = train.run("run", *settings, fault="nan@11-23")
    assert training.code == 1
    assert training.status["status"] == "failed"
    assert "after 1 rollback(s)" in training.status["cause"]
    records = [checkpoint.read_sidecar(p) for p in checkpoint.list_checkpoints(training.directory / "checkpoints")]
    assert any(r["refused_in_a_row"] == 0 for r in records)
    for path in checkpoint.list_checkpoints(training.directory / "checkpoints"):
        assert all(torch.isfinite(t).all() for t in checkpoint.load(path)["model"].values())


def test_a_rollback_survives_a_kill_and_stays_the_only_one_allowed(train: Trainer) -> None:
    settings = ("guard.max_skipped_steps=3", "guard.max_rollbacks=1")
    undisturbed = train.run("undisturbed", *settings, fault="nan@11-14")
    assert undisturbed.code == 0
    train.run("run", *settings, fault="nan@11-14,kill@18")
    again = train.run("run", *settings)
    assert again.code == 0
    assert state_hash(again.directory) == state_hash(undisturbed.directory)
    assert checkpoint.load(newest(again.directory))["guard"]["rollbacks"] == 1


@pytest.mark.parametrize("policy", ["stop", "rollback", "warn"])
def test_a_collapsed_model_is_noticed_within_an_epoch(train: Trainer, policy: str) -> None:
    training = train.run("run", f"guard.collapse_policy={policy}", fault="collapse@16-23", ranks=1)
    if policy == "stop":
        assert training.code == 1
        assert training.status["cause"].startswith("TrainingFailed: the model has collapsed: loss 2.30")
        assert training.status["step"] <= 16 + 8
    elif policy == "rollback":
        (rollback,) = training.events("rollback")
        assert rollback["to"] == "step_00000016.pt"
        assert training.code == 0
    else:
        assert training.code == 0
        assert any("collapsed" in e["message"] for e in training.events("warning"))


def test_debug_nan_names_the_module(train: Trainer) -> None:
    """The classifier's weights are poisoned through the checkpoint's, as an overflow would leave them."""
    train.run("run", "trainer.max_steps=8", ranks=1)
    path = newest(train.output_dir / "run")
    state, record = checkpoint.load(path), checkpoint.read_sidecar(path)
    state["model"]["head.weight"][0, 0] = torch.nan
    checkpoint.write(path, state, record)
    training = train.run("run", "debug=nan", ranks=1)
    assert training.code == 1
    assert (
        "debug=nan: head (Linear) gave a value that is not finite; its weight is not finite" in training.status["cause"]
    )


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (
            "memory@0:1/step",
            "training on 4 images at once; type trainer.micro_batch_size=2 (the same global batch by accumulation; BatchNorm "
            "sees 2 images), or trainer.grad_checkpointing=true",
        ),
        ("memory@8:1/evaluate", "evaluating 4 images at once; type trainer.eval_batch_size=2"),
    ],
)
def test_a_first_step_or_evaluation_that_does_not_fit_into_memory_is_refused_with_what_to_type(
    train: Trainer, fault: str, advice: str
) -> None:
    training = train.run("run", "trainer.eval_batch_size=4", fault=fault)
    assert training.code == 1
    assert training.status["refused"]
    assert "the memory of cpu is full" in training.status["cause"] and advice in training.status["cause"]


def test_memory_that_is_full_later_on_does_not_keep_the_run_from_going_on(train: Trainer, reference: str) -> None:
    training = train.run("run", fault="memory@11:1/step")
    assert training.code == 1
    assert "refused" not in training.status and "OutOfMemoryError" in training.status["cause"]
    assert train.run("run").code == 0
    assert state_hash(training.directory) == reference


def test_memory_that_sufficed_before_and_is_full_at_a_resume_does_not_keep_the_run_from_going_on(
    train: Trainer, reference: str
) -> None:
    """The job before may still hold some of it; a refusal would have the scheduler give the run up."""
    train.run("run", "trainer.max_steps=11")
    training = train.run("run", fault="memory@11:1/step")
    assert training.code == 1
    assert "refused" not in training.status and "does another process hold some of it" in training.status["cause"]
    assert train.run("run").code == 0
    assert state_hash(training.directory) == reference
