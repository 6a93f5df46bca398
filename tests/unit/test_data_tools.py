"""The tools that look at a data set before a run: check_data.py and preview_batch.py."""

import json

import pytest

from scripts import check_data
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
