"""eval.py scores what it is given: a run by its best checkpoint, a file by itself, a published file by its shape."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mambavision import VARIANTS, create_model
from mambavision.compose import CONF_DIR, compose_eval_config, compose_train_config, quoted
from mambavision.engine.score import implied_overrides, report, score, with_quoted_checkpoint
from mambavision.engine.session import run
from mambavision.run_dir import plain
from tests.integration.test_experiments import SHRUNK
from tests.unit.data_samples import smooth_image

ROOT = CONF_DIR.parent


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


def test_scores_under_other_settings_do_not_replace_those_that_are_there(
    finished_run: tuple[Path, dict], tmp_path: Path
):
    shutil.copytree(finished_run[0] / "checkpoints", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step_00000002.pt"
    for file in tmp_path.glob("*.eval.json"):
        file.unlink()
    for given in ([], ["data.image_size=48"], ["data.crop_pct=0.9", "precision=fp32"]):
        evaluate(f"checkpoint={path}", *given)
    written = {p.name: json.loads(p.read_text())["image_size"] for p in tmp_path.glob("*.eval.json")}
    assert written == {
        f"{path.name}.val.eval.json": 32,
        f"{path.name}.val,data.image_size=48.eval.json": 48,
        f"{path.name}.val,precision=fp32,data.crop_pct=0.9.eval.json": 32,
    }


def test_a_checkpoint_with_a_flipped_bit_is_not_scored(finished_run: tuple[Path, dict], tmp_path: Path):
    shutil.copytree(finished_run[0], tmp_path / "x")
    path = tmp_path / "x" / "checkpoints" / "step_00000002.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step_00000002.pt is damaged: its checksum does not match"):
        evaluate(f"checkpoint={path}")
    path.with_name("step_00000002.pt.json").unlink()  # what it should be is not known then
    assert evaluate(f"checkpoint={path}")["images"] == 37


def test_real_labels_are_not_looked_up_among_other_classes(finished_run: tuple[Path, dict], tmp_path: Path):
    for split in ("train", "val"):
        for name in [f"n{number:08d}" for number in range(10)]:
            smooth_image(0, 20, 24).save(mkdir(tmp_path / split / name) / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="answers among ImageNet's 1000 classes, the data has 10"):
        evaluate(f"checkpoint={finished_run[0]}", "data=folder", f"data.path={tmp_path}", "eval_set=imagenet_real")


def mkdir(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_imagenet_c_says_its_mce_or_why_there_is_none(capsys: pytest.CaptureFixture[str]):
    scores = {f"{prefix}{key}": 50.0 for prefix in ("", "ema_") for key in ("top1", "top5", "loss")}
    record = {
        **{"checkpoint": "x.pt", "model": "m", "eval_set": "imagenet_c", "images": 3, "image_size": 224},
        **{"crop_pct": 1.0, "crop_mode": "center", "precision": "fp32", "img_per_sec": 9.0, **scores},
    }
    report(record, {"": None, "ema_": None})
    assert "no mCE: it takes all 15 corruptions" in capsys.readouterr().out
    report({**record, "mce": 61.25, "ema_mce": 59.5}, {"": None, "ema_": None})
    assert re.findall(r"mCE ([\d.]+) %", capsys.readouterr().out) == ["61.250", "59.500"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("given", "advice"), [("device=cuda", "eval.py: device=cpu"), ("precision=fp16", "precision=bf16")]
)
def test_advice_names_what_eval_py_has(given: str, advice: str, finished_run: tuple[Path, dict]):
    with pytest.raises(ValueError, match=advice):
        evaluate(f"checkpoint={finished_run[0]}", given)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--help"], "eval.py checkpoint=runs/NAME"),
        (["-m", "checkpoint=x"], "error: -m is no setting; eval.py takes key=value"),
    ],
)
def test_eval_py_answers_flags(words: list[str], answer: str):
    done = subprocess.run([sys.executable, "eval.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert answer in done.stdout + done.stderr
    assert done.returncode == (0 if words == ["--help"] else 2)


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


@pytest.mark.parametrize("path", ["/données", r"/a\b (1)", '/it\'s, "it"', "/1.10", "/a=b"])
def test_data_in_a_directory_of_any_name_is_found_again(path: str, tmp_path: Path):
    """Trained on /données, eval.py checkpoint=... looked for the data in /donn\\u00e9es."""
    cfg = compose_train_config(["model=mambavision_nano", "data=folder", f"data.path={quoted(path)}"])
    torch.save({"config": plain(asdict(cfg)), "model": {}}, tmp_path / "run.pt")
    given = [f"checkpoint={tmp_path / 'run.pt'}"]
    assert compose_eval_config([*implied_overrides(given), *given]).data.path == path


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
