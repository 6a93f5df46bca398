"""Trainings over .beton files: exact resume, damaged images, swapped files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data.conversion import WriteSettings, write_beton
from data.datasets import list_folder
from tests.faults.harness import STEPS, Trainer, state_hash

pytestmark = pytest.mark.faults
FFCV = ("data=ffcv", "data.image_size=32", "data.num_classes=null", "data.num_workers=1", "augment=small_images")


def write(images: Path, out: Path) -> None:
    train = list_folder(images / "train")
    for split, source in (("train", train), ("val", list_folder(images / "val", classes=train.classes))):
        write_beton(source, out / f"{split}.beton", WriteSettings(None, 90, "jpg", 0.5), num_workers=1)


@pytest.fixture
def beton(images: Path, tmp_path: Path) -> Path:
    """132 JPEG images in two classes as .beton files."""
    write(images, tmp_path / "beton")
    return tmp_path / "beton"


def damage_an_image(path: Path, image: int) -> None:
    """In the data region alone, so that the file's tables still are what its manifest says."""
    from data.beton import open_beton

    stored = bytes(open_beton(path).stored(image).data)
    content = bytearray(path.read_bytes())
    start = content.index(stored)
    content[start + 2 : start + len(stored)] = bytes(len(stored) - 2)
    path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_over_beton_files_resumes_exactly(train_ffcv: Trainer, beton: Path, ranks: int) -> None:
    settings = (*FFCV, f"data.path={beton}")
    undisturbed = train_ffcv.run("undisturbed", *settings, ranks=ranks)
    assert undisturbed.code == 0, undisturbed.output
    for step in (3, 13) if ranks == 1 else (11,):
        train_ffcv.run("run", *settings, ranks=ranks, fault=f"kill@{step}:0")
    again = train_ffcv.run("run", *settings, ranks=ranks)
    assert again.code == 0
    assert again.status["step"] == STEPS
    assert state_hash(again.directory) == state_hash(undisturbed.directory)


def test_a_corrupt_image_in_a_beton_is_replaced_alike_on_every_resume_and_named(
    train_ffcv: Trainer, beton: Path
) -> None:
    damage_an_image(beton / "train.beton", 40)
    settings = (*FFCV, f"data.path={beton}", "data.max_corrupt_fraction=0.5")
    undisturbed = train_ffcv.run("undisturbed", *settings, ranks=1)
    assert undisturbed.code == 0, undisturbed.output
    assert "train.beton[40]" in undisturbed.output
    train_ffcv.run("run", *settings, ranks=1, fault="kill@11")
    again = train_ffcv.run("run", *settings, ranks=1)
    assert again.code == 0
    assert state_hash(again.directory) == state_hash(undisturbed.directory)


def test_a_run_is_not_continued_on_another_data_set(train_ffcv: Trainer, beton: Path, images: Path) -> None:
    settings = (*FFCV, f"data.path={beton}")
    assert train_ffcv.run("run", *settings, ranks=1, fault="term@3").status["step"] == 4
    for path in sorted((images / "train/class0").iterdir())[:2]:
        path.unlink()
    shutil.rmtree(beton)
    write(images, beton)
    refused = train_ffcv.run("run", *settings, ranks=1)
    assert refused.code == 2
    assert "this run was started on other data" in refused.output
    assert "samples: 132 -> 130" in refused.output


def test_a_run_is_not_continued_on_renamed_classes(train_ffcv: Trainer, beton: Path, images: Path) -> None:
    """The files are the same to the byte: only the manifest knows."""
    settings = (*FFCV, f"data.path={beton}")
    assert train_ffcv.run("run", *settings, ranks=1, fault="term@3").status["step"] == 4
    before = (beton / "train.beton").read_bytes()
    for split in ("train", "val"):
        (images / split / "class1").rename(images / split / "zebra")
    write(images, beton)
    assert (beton / "train.beton").read_bytes() == before
    refused = train_ffcv.run("run", *settings, ranks=1)
    assert refused.code == 2
    assert "class_names: number 1 was ['class1'], is ['zebra']" in refused.output
