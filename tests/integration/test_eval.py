"""eval.py scores what it is given: a run by its best checkpoint, a file by itself, a published file by its shape."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

from mambavision import VARIANTS, create_model
from mambavision.compose import compose_eval_config, compose_train_config
from mambavision.engine.score import implied_overrides, score, with_quoted_checkpoint
from mambavision.engine.session import run
from tests.integration.test_experiments import SHRUNK


def evaluate(*given: str) -> dict:
    return score(compose_eval_config([*implied_overrides(list(given)), *given]))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("runs")
    overrides = ["model=mambavision_nano", *SHRUNK, "trainer.ema_decay=0.5", f"output_dir={output}", "run_name=x"]
    overrides += ["data.synthetic_eval_samples=37", "trainer.precision=fp32"]
    return output / "x", run(compose_train_config(overrides))


def test_a_run_directory_gives_the_scores_its_training_logged(finished_run: tuple[Path, dict]):
    directory, status = finished_run
    result = evaluate(f"checkpoint={directory}", "precision=fp32", "batch_size=5")
    assert result["images"] == 37
    for key in ("top1", "top5", "ema_top1", "ema_top5"):
        assert result[key] == status[f"eval/{key}"], key
    assert result["loss"] == pytest.approx(status["eval/loss"], rel=1e-4)


def test_the_json_file_says_what_was_scored(finished_run: tuple[Path, dict], tmp_path: Path):
    directory, _ = finished_run
    result = evaluate(f"checkpoint={directory}", f"out={tmp_path / 'scores.json'}")
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(result))
    assert result["checkpoint"].endswith("step_00000002.pt")


def test_a_published_file_is_recognised_by_its_shape(tmp_path: Path):
    model = create_model("mambavision_t", num_classes=10)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    path = tmp_path / "published.pth.tar"
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.005)}, path)
    given = [f"checkpoint={path}", "data=synthetic", "data.num_classes=10", "data.image_size=32"]
    assert implied_overrides(given) == ["model=mambavision_t", "data.crop_pct=1.0", "data.crop_mode=center"]
    result = evaluate(*given, "data.synthetic_eval_samples=3")
    assert result["images"] == 3
    assert "ema_top1" not in result


@pytest.mark.parametrize(
    ("variant", "file", "implied"),
    [
        ("mambavision_s", "mambavision_small_1k.pth.tar", ["mambavision_s", 224, 0.93, "center"]),
        ("mambavision_t2", "mambavision_tiny2_1k.pth.tar", ["mambavision_t2", 224, 0.98, "center"]),
        ("mambavision_l2", "mambavision_large2_1k.pth.tar", ["mambavision_l2", 224, 1.0, "center"]),
        ("mambavision_l2", "mambavision_L2_21k_240m_512.pth.tar", ["mambavision_l2_512_21k", 512, 0.93, "squash"]),
        (
            "mambavision_l3_256_21k",
            "mambavision_L3_21k_740m_512.pth.tar",
            ["mambavision_l3_512_21k", 512, 0.93, "squash"],
        ),
    ],
)
def test_a_published_file_is_scored_as_published(variant: str, file: str, implied: list, tmp_path: Path):
    """Its own image size and crop, not those of the training recipe in conf/model."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in create_model(variant).state_dict().items()}
    one = torch.zeros(())
    torch.save({"state_dict": {name: one.expand(shape) for name, shape in shapes.items()}}, tmp_path / file)
    given = [f"checkpoint={tmp_path / file}"]
    keys = ("model", "data.image_size", "data.crop_pct", "data.crop_mode")
    assert implied_overrides(given) == [f"{key}={value}" for key, value in zip(keys, implied, strict=True)]
    model = VARIANTS[implied[0]]
    cfg = compose_eval_config([*implied_overrides(given), *given])
    assert (cfg.data.image_size, cfg.data.crop_pct, cfg.data.crop_mode) == (
        model.image_size,
        model.crop_pct,
        model.crop_mode,
    )


def test_a_model_of_other_classes_than_the_data_is_refused(finished_run: tuple[Path, dict]):
    directory, _ = finished_run
    with pytest.raises(ValueError, match="trained for 10 classes, synthetic .val. has 7; give the data"):
        evaluate(f"checkpoint={directory}", "data.num_classes=7")


def test_what_cannot_be_written_is_said_before_the_evaluation(finished_run: tuple[Path, dict], tmp_path: Path):
    with pytest.raises(ValueError, match="is a directory; give another file with out=FILE"):
        evaluate(f"checkpoint={finished_run[0]}", f"out={tmp_path}")


@pytest.mark.parametrize("name", ["optimizer.lr=0.001", "my model (1), it's"])
def test_a_run_directory_of_any_name_can_be_given(name: str, finished_run: tuple[Path, dict], tmp_path: Path):
    shutil.copytree(finished_run[0], tmp_path / name)
    for given in (f"checkpoint={tmp_path / name}", f'checkpoint="{tmp_path / name}"'):
        words = [given, f"out={tmp_path / 'scores.json'}"]
        cfg = compose_eval_config([*implied_overrides(words), *with_quoted_checkpoint(words)])
        assert cfg.checkpoint == str(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ([], r"type checkpoint=PATH"),
        (["checkpoint=/no/such/file.pt"], r"'/no/such/file.pt' does not exist"),
        (["checkpoint=."], r"is a directory without checkpoints"),
    ],
)
def test_a_missing_checkpoint_is_answered_with_what_to_type(given: list[str], advice: str):
    with pytest.raises(ValueError, match=advice):
        implied_overrides(given)
