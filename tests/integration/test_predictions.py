"""eval.py predictions=FILE.csv: one row for each image, in the order of the data set, however many ranks there are."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from mambavision import create_model
from mambavision.compose import CONF_DIR, compose_eval_config, compose_train_config
from mambavision.config import DataConfig
from mambavision.engine.score import implied_overrides, score
from mambavision.engine.session import run
from tests.integration.test_experiments import SHRUNK
from tests.unit.data_samples import make_betons, make_folder

IMAGES = 23  # three classes; neither 2 ranks nor batches of 4 divide it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on class folders, which lie in `images/` beside it."""
    directory = tmp_path_factory.mktemp("runs")
    folder = make_folder(directory / "images", train=24, val=IMAGES)
    overrides = [o for o in SHRUNK if not o.startswith("data")]
    overrides += ["model=mambavision_nano", "data=folder", f"data.path={folder}", "data.num_workers=1"]
    overrides += ["trainer.ema_decay=0.5", "trainer.precision=fp32", "optimizer.lr=0.05", "schedule.warmup_epochs=0"]
    run(compose_train_config([*overrides, f"output_dir={directory}", "run_name=x"]))
    return directory / "x"


def evaluate(*given: str) -> dict:
    return score(compose_eval_config([*implied_overrides(list(given)), *given]))


def read(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_each_image_has_its_row_and_the_rows_add_up_to_the_scores(trained: Path, tmp_path: Path, capsys):
    file = tmp_path / "new" / "predictions.csv"
    result = evaluate(f"checkpoint={trained}", f"predictions={file}", "precision=fp32", "batch_size=4")
    assert f"predictions of the EMA weights written to {file}" in capsys.readouterr().out
    assert (result["predictions"], result["predictions_of"]) == (str(file), "ema")
    rows = read(file)
    names = sorted(str(p.relative_to(trained.parent / "images" / "val")) for p in trained.parent.glob("images/val/*/*"))
    assert [(int(r["index"]), r["file"]) for r in rows] == list(enumerate(names))
    for row in rows:
        assert row["target_name"] == row["file"].split("/")[0] == f"class_{row['target']}"
        answers = [(int(row[f"top{n}"]), row[f"top{n}_name"], float(row[f"top{n}_prob"])) for n in (1, 2, 3)]
        assert sorted(number for number, _, _ in answers) == [0, 1, 2]
        assert all(name == f"class_{number}" for number, name, _ in answers)
        probabilities = [p for _, _, p in answers]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert "top4" not in rows[0], "there are three classes"
    right = sum(row["top1"] == row["target"] for row in rows)
    assert 100 * right / IMAGES == pytest.approx(result["ema_top1"])


@pytest.mark.slow
def test_the_probabilities_are_those_of_the_ema_model(trained: Path, tmp_path: Path):
    evaluate(f"checkpoint={trained}", f"predictions={tmp_path / 'p.csv'}", "precision=fp32")
    cfg = compose_eval_config([*implied_overrides([f"checkpoint={trained}"]), f"checkpoint={trained}"])
    model = create_model(
        "mambavision_nano", num_classes=3, checkpoint=trained, weights="ema", **cfg.model.architecture
    ).eval()
    loader = data.build_eval_loader(cfg.data, batch_size=IMAGES)
    (batch,) = loader
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (cfg.data.mean, cfg.data.std))
    with torch.no_grad():
        expected = model((batch.images - mean) / std).softmax(1)
    loader.close()
    for row in read(tmp_path / "p.csv"):
        for n in (1, 2, 3):
            assert float(row[f"top{n}_prob"]) == pytest.approx(
                expected[int(row["index"]), int(row[f"top{n}"])].item(), abs=1e-4
            )


@pytest.mark.slow
def test_two_ranks_write_the_rows_that_one_does(trained: Path, tmp_path: Path):
    words = [str(CONF_DIR.parent / "eval.py"), f"checkpoint={trained}", "precision=fp32", "batch_size=4", "device=cpu"]
    words += [f"out={tmp_path / 'scores.json'}"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", [sys.executable]), ("two", two)):
        done = subprocess.run(
            [*launcher, *words, f"predictions={tmp_path / name}.csv"],
            cwd=CONF_DIR.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("predictions of the EMA weights") == 1
    one, two = read(tmp_path / "one.csv"), read(tmp_path / "two.csv")
    keys = [k for k in one[0] if not k.endswith("_prob")]
    assert [[row[k] for k in keys] for row in two] == [[row[k] for k in keys] for row in one]
    for a, b in zip(one, two, strict=True):
        assert float(a["top1_prob"]) == pytest.approx(float(b["top1_prob"]), abs=1e-4)


@pytest.mark.slow
def test_beton_files_give_the_same_names(trained: Path, tmp_path: Path):
    path = make_betons(trained.parent / "images", tmp_path)
    evaluate(f"checkpoint={trained}", f"predictions={tmp_path / 'p.csv'}", "data=ffcv", f"data.path={path}")
    assert [r["file"] for r in read(tmp_path / "p.csv")] == list(
        data.build_eval_loader(DataConfig(source="folder", path=str(trained.parent / "images")), batch_size=1).names
    )


@pytest.mark.slow
def test_what_must_not_or_cannot_be_written_is_refused_before_the_evaluation(trained: Path, tmp_path: Path):
    (tmp_path / "there.csv").write_text("mine")
    for file, message in (
        ("there.csv", "there.csv exists already; remove it, or give another file with predictions=FILE.csv"),
        ("there.csv/x.csv", "cannot write .*x.csv: .*; give another file with predictions=FILE.csv"),
        (".", "is a directory; give another file with predictions=FILE.csv"),
        ("scores.json", "is where the scores go; give another file with predictions=FILE.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(f"checkpoint={trained}", f"predictions={tmp_path / file}", f"out={tmp_path / 'scores.json'}")
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert not (tmp_path / "scores.json").exists(), "nothing was evaluated"
