"""The same training at any world size: the same images in the same micro-batches, equal to the order of summation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mambavision.telemetry.sinks import read_events
from tests.integration.torchrun import train

OVERRIDES = (
    "experiment=tiny",
    "augment=imagenet",
    "augment.auto_augment=none",
    "data.synthetic_train_samples=640",
    "trainer.global_batch_size=128",
    "trainer.micro_batch_size=64",
    "trainer.max_steps=20",
    "trainer.log_every_steps=1",
    "logger=jsonl",
)


@pytest.fixture(scope="module")
def two_ranks_and_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    output = tmp_path_factory.mktemp("runs")
    for name, ranks in (("two", 2), ("one", 1)):
        result = train(*OVERRIDES, f"output_dir={output}", f"run_name={name}", ranks=ranks)
        assert result.returncode == 0, result.stderr
    return output / "two", output / "one"


def test_loss_of_two_ranks_equals_that_of_one_with_accumulation(two_ranks_and_one: tuple[Path, Path]):
    two, one = (
        [e["train/loss"] for e in read_events(run / "metrics.jsonl") if e["event"] == "train"]
        for run in two_ranks_and_one
    )
    assert len(two) == len(one) == 20
    assert two == pytest.approx(one, rel=1e-4)


def test_weights_and_statistics_of_two_ranks_equal_those_of_one(two_ranks_and_one: tuple[Path, Path]):
    two, one = (
        torch.load(run / "checkpoints" / "step_00000020.pt", weights_only=True)["model"] for run in two_ranks_and_one
    )
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_ranks_with_other_settings_are_refused_before_any_work(tmp_path: Path):
    result = train("experiment=tiny", f"output_dir={tmp_path}", "trainer.agree_every_steps=1{RANK}", ranks=2)
    assert result.returncode != 0
    assert "the ranks have composed different configurations" in result.stderr
    assert not list(tmp_path.iterdir())
