"""The tools that look at a data set before a run: check_data.py and preview_batch.py."""

import json

import pytest
from PIL import Image

from scripts import check_data, preview_batch
from tests.unit.data_samples import make_folder, smooth_image


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "set")


def test_check_data_passes_a_sound_folder_and_writes_what_was_asked_for(folder, tmp_path):
    outputs = ["--json", str(tmp_path / "report.json"), "--contact-sheet", str(tmp_path / "sheet.png")]
    assert check_data.main([str(folder), "--num-workers", "1", *outputs]) == 0
    assert [r["images"] for r in json.loads((tmp_path / "report.json").read_text())] == [24, 13]
    assert (tmp_path / "sheet-train.png").exists() and (tmp_path / "sheet-val.png").exists()


def test_check_data_finds_a_validation_class_that_training_lacks(folder, capsys):
    (folder / "val" / "class_9").mkdir()
    smooth_image(1, 40, 40).save(folder / "val" / "class_9" / "0.jpg")
    assert check_data.main([str(folder), "--num-workers", "1"]) == 1
    assert "classes that training does not know: class_9" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--contact-sheet", "sheet", "ends in .png"),
        ("--contact-sheet", "missing/sheet.png", "missing does not exist; make it"),
        ("--json", "missing/report.json", "missing does not exist; make it"),
        ("--json", "set", "is a directory; give the name of a file"),
    ],
)
def test_check_data_refuses_an_output_path_before_it_decodes(
    folder, tmp_path, capsys, monkeypatch, option, path, message
):
    monkeypatch.setattr(check_data, "check_split", lambda *_: pytest.fail("decoded first"))
    assert check_data.main([str(folder), option, str(tmp_path / path)]) == 2
    assert message in capsys.readouterr().err


def test_check_data_refuses_a_directory_that_is_not_ours(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_data.os, "access", lambda *_: False)  # root may write into a read-only directory
    assert check_data.main([str(folder), "--json", str(tmp_path / "report.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def preview(folder, *arguments):
    settings = ["data=folder", f"data.path={folder}", "data.num_workers=1", "model=mambavision_t"]
    return preview_batch.main([*settings, *map(str, arguments)])


def test_preview_shows_a_set_that_is_smaller_than_the_global_batch(folder, tmp_path, capsys):
    assert preview(folder, "--out", tmp_path / "x.png", "--count", 6, "data.image_size=32") == 0
    said = capsys.readouterr()
    assert "24 images are fewer than trainer.global_batch_size=4096; shown with 24" in said.err
    assert "6 samples of epoch 0, step 0, 32 px" in said.out
    assert Image.open(tmp_path / "x.png").width > 3 * 32


def test_preview_keeps_the_answer_for_batches_that_do_not_divide(folder, tmp_path, capsys):
    batches = ("trainer.global_batch_size=18", "trainer.micro_batch_size=4")
    assert preview(folder, "--out", tmp_path / "x.png", *batches) == 2
    assert "is not a multiple of trainer.micro_batch_size=4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "0"), "--count 0: show at least 1"),
        (("--epoch", "-1"), "--epoch -1: epochs count from 0"),
        (("--out", "x"), "ends in .png"),
        (("--out", "missing/x.png"), "missing does not exist; make it"),
        (("--out", "taken.png"), "cannot be written"),
    ],
)
def test_preview_answers_what_it_cannot_write_before_loading(tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "taken.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preview_batch, "build_train_loader", lambda *_, **__: pytest.fail("loaded first"))
    assert preview(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
