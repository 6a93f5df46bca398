"""Images as people really have them: odd ones are read, broken ones are named, none hangs and none passes silently."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from data import build_eval_loader, build_train_loader
from data.beton import open_beton
from data.conversion import WriteSettings, write_beton
from data.corrupt import CorruptImages, UnreadableImages
from data.datasets import list_folder
from data.jpeg_check import jpeg_damage
from data.order import EpochPlan
from data.pixels import read_image
from mambavision.config import AugmentConfig, DataConfig
from tests.unit.data_samples import make_betons, make_folder, smooth_image


def encoded(image: Image.Image | None = None, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    (image or smooth_image(1, 160, 120)).save(buffer, format, **options)
    return buffer.getvalue()


def overwritten(content: bytes, start: float, share: float, byte: int) -> bytes:
    at, count = int(len(content) * start), int(len(content) * share)
    return content[:at] + bytes([byte]) * count + content[at + count :]


def noisy(width: int = 160, height: int = 120) -> Image.Image:
    """An image whose JPEG is mostly picture data, so that damage in the middle hits pixels, not tables."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb() -> bytes:
    """A PNG that claims 60 000 x 60 000 px."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


ROTATED = Image.Exif()
ROTATED[0x0112] = 6

READABLE = {  # name: (bytes, size that is read)
    "cmyk.jpg": (encoded(smooth_image(1, 160, 120).convert("CMYK")), (160, 120)),
    "grey.jpg": (encoded(smooth_image(1, 160, 120).convert("L")), (160, 120)),
    "sixteen_bit.png": (encoded(Image.fromarray(np.full((30, 40), 40_000, np.uint16)), "PNG"), (40, 30)),
    "rotated.jpg": (encoded(exif=ROTATED), (160, 120)),
    "one_pixel.png": (encoded(smooth_image(0, 1, 1), "PNG"), (1, 1)),
    "very_wide.jpg": (encoded(smooth_image(0, 10_000, 3)), (10_000, 3)),
    "png_named.jpg": (encoded(format="PNG"), (160, 120)),
    "palette.png": (encoded(smooth_image(0, 20, 20).convert("P"), "PNG", transparency=0), (20, 20)),
    "transparent.png": (encoded(smooth_image(0, 20, 20).convert("RGBA"), "PNG"), (20, 20)),
    "progressive.jpg": (encoded(progressive=True), (160, 120)),
    "animation_named.png": (encoded(smooth_image(0, 20, 20).convert("P"), "GIF", save_all=True), (20, 20)),
    "bytes_after_the_end.jpg": (encoded() + b"\0" * 100, (160, 120)),
}
BROKEN = {
    "cut_in_half.jpg": encoded(noisy())[:9000],
    "cut_in_the_header.jpg": encoded()[:100],
    "end_missing.jpg": encoded(noisy())[:-300],
    "empty.jpg": b"",
    "middle_zeroed.jpg": overwritten(encoded(noisy()), 0.5, 0.2, 0),
    "bytes_flipped.jpg": overwritten(encoded(noisy()), 0.5, 0.005, 0xFF),
    "header_zeroed.jpg": overwritten(encoded(), 0.0, 0.1, 0),
    "text.jpg": b"this is not an image\n" * 50,
    "cut.png": encoded(noisy(), "PNG")[:5000],
    "flipped.png": overwritten(encoded(noisy(), "PNG"), 0.5, 0.01, 0xFF),
    "decompression_bomb.png": bomb(),
}
if features.check("avif"):
    BROKEN["damaged_avif.png"] = encoded(format="AVIF").replace(b"iloc", b"xxxx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged") / "train"
    for number in range(40):
        (root / "whole").mkdir(parents=True, exist_ok=True)
        (root / "whole" / f"{number:02d}.jpg").write_bytes(encoded(smooth_image(number, 50, 40)))
    (root / "odd").mkdir()
    for name, content in {**{name: item[0] for name, item in READABLE.items()}, **BROKEN}.items():
        (root / "odd" / name).write_bytes(content)
    (root / "odd" / "link_to_nowhere.jpg").symlink_to("/nowhere/at/all.jpg")
    (root / "odd" / "directory.jpg").mkdir()
    (root / "odd" / "notes.txt").write_text("not looked at")
    return root


UNREADABLE_NAMES = sorted(f"odd/{name}" for name in [*BROKEN, "link_to_nowhere.jpg"])


def test_writing_leaves_out_the_broken_and_keeps_the_odd(folder, tmp_path):
    settings = WriteSettings(write_mode="original", max_resolution=None)
    manifest = write_beton(list_folder(folder), tmp_path / "t.beton", settings, num_workers=2)
    reasons = {item["path"]: item["reason"] for item in manifest.unreadable}
    assert sorted(reasons) == UNREADABLE_NAMES and "0x" not in "".join(reasons.values()), "the same in every writing"
    assert manifest.num_samples == 40 + len(READABLE)
    sizes = {(int(row["width"]), int(row["height"])) for row in open_beton(tmp_path / "t.beton").images}
    assert sizes == {size for _, size in READABLE.values()} | {(50, 40)}


def test_training_from_the_folder_replaces_and_names_the_broken(folder):
    data = DataConfig(source="folder", path=str(folder.parent), image_size=16, num_workers=2, max_corrupt_fraction=0.5)
    count = len(list_folder(folder).names)
    loader = build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=count, micro_batch_size=count)
    (batch,) = loader.epoch(0)
    assert len(batch) == count
    assert sorted(name.split("train/")[1] for name in loader.corrupt.found) == UNREADABLE_NAMES
    loader.close()


@pytest.mark.parametrize("name", READABLE)
def test_odd_images_are_read_in_their_size(name):
    content, size = READABLE[name]
    assert read_image(content).size == size and jpeg_damage(content) == ""


def test_an_exif_orientation_is_ignored_as_in_torchvision():
    np.testing.assert_array_equal(read_image(READABLE["rotated.jpg"][0]), read_image(encoded()))


def test_pillow_alone_would_have_passed_the_damage():
    """Why jpeg_check is there."""
    damaged = BROKEN["middle_zeroed.jpg"]
    assert read_image(damaged).size == (160, 120) and "damaged" in jpeg_damage(damaged)


@pytest.fixture
def broken_folder(tmp_path):
    root = make_folder(tmp_path / "broken", train=30, val=9)
    for split, number in (("train", 7), ("val", 4)):
        path = next((root / split).rglob(f"{number:04d}.jpg"))
        path.write_bytes(path.read_bytes()[:300])
    return root


def train_loader(data: DataConfig):
    return build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=30, micro_batch_size=15)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_unreadable_image_is_replaced_by_the_next_and_named(broken_folder, num_workers, caplog):
    data = DataConfig(
        source="folder", path=str(broken_folder), image_size=32, num_workers=num_workers, max_corrupt_fraction=0.1
    )
    loader, source = train_loader(data), list_folder(broken_folder / "train")
    broken = next(i for i, name in enumerate(source.names) if name.endswith("0007.jpg"))
    targets = {}
    for batch in loader.epoch(0):
        targets |= dict(zip(batch.indices.tolist(), batch.targets.tolist()))
    loader.close()
    assert len(targets) == 30 and targets[broken] == source.labels[broken + 1]
    assert list(loader.corrupt.found) == [str(source.path(broken))] and "0007.jpg" in caplog.text


@pytest.mark.slow
def test_one_bad_image_does_not_end_a_run_on_a_small_set(broken_folder):
    """One of 30 is more than the default share, and of 9 more than any share one would give."""
    data = DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1)
    for loader in (train_loader(data), build_eval_loader(data, batch_size=4)):
        batches = loader.epoch(0) if hasattr(loader, "epoch") else loader
        assert sum(len(batch) for batch in batches) == (30 if hasattr(loader, "epoch") else 8)
        assert len(loader.corrupt.found) == 1
        loader.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "broken", "advice"),
    [
        ({}, (7, 8, 9, 10), "max_corrupt_fraction"),
        ({"max_corrupt_fraction": 0.0}, (7,), "max_corrupt_fraction"),
        ({"corrupt_images": "stop"}, (7,), "corrupt_images=skip"),
    ],
)
def test_too_many_unreadable_images_and_the_stop_policy_end_the_run(broken_folder, settings, broken, advice):
    for number in broken:
        next((broken_folder / "train").rglob(f"{number:04d}.jpg")).write_bytes(b"")
    data = DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1, **settings)
    loader = train_loader(data)
    with pytest.raises(UnreadableImages, match=advice) as error:
        list(loader.epoch(0))
    assert any(
        f"{number:04d}.jpg: the file is empty" in str(error.value).replace(" cannot be read", "") for number in broken
    )
    loader.close()


def test_a_set_of_which_nothing_can_be_read_is_refused_however_small(broken_folder):
    for path in (broken_folder / "val").rglob("*.jpg"):
        if path.name > "0002.jpg":
            path.unlink()
        else:
            path.write_bytes(b"<!DOCTYPE html>404")
    loader = build_eval_loader(
        DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1), batch_size=4
    )
    with pytest.raises(
        UnreadableImages, match="3 of this epoch's 3 images cannot be read.*begins with b'<!DOCTYPE html>"
    ):
        list(loader)
    loader.close()


def test_resuming_late_in_an_epoch_does_not_shrink_the_budget(tmp_path):
    """The budget is a share of the epoch, not of what is left of it."""
    root = make_folder(tmp_path / "in", train=30, val=1)
    source = list_folder(root / "train")
    for sample in EpochPlan(30, 3, 3).order(0, 0)[-4:].tolist():
        source.path(sample).write_bytes(b"")
    data = DataConfig(source="folder", path=str(root), image_size=32, num_workers=1, max_corrupt_fraction=0.3)
    loader = build_train_loader(data, AugmentConfig(), seed=0, global_batch_size=3, micro_batch_size=3)
    assert sum(1 for _ in loader.epoch(0, first_step=8)) == 2 and len(loader.corrupt.found) >= 4
    loader.close()


def test_evaluation_leaves_an_unreadable_image_out(broken_folder, caplog):
    data = DataConfig(source="folder", path=str(broken_folder), image_size=32, num_workers=1, max_corrupt_fraction=0.2)
    loader = build_eval_loader(data, batch_size=4)
    assert sum(len(batch) for batch in loader) == 8 and "0004.jpg" in caplog.text
    loader.close()


def test_damage_inside_a_beton_is_noticed_replaced_and_named(tmp_path, caplog):
    make_betons(make_folder(tmp_path / "in", train=30, val=9), tmp_path, write_mode="jpg")
    for split, image in (("train", 11), ("val", 3)):
        beton = open_beton(tmp_path / f"{split}.beton")
        start, size = int(beton.images["data_ptr"][image]), int(beton.sizes[image])
        with open(beton.path, "r+b") as file:
            file.seek(start + size // 3)
            file.write(bytes(size // 2))
    data = DataConfig(path=str(tmp_path), image_size=32, num_workers=2, max_corrupt_fraction=0.2)
    loader = train_loader(data)
    labels = open_beton(tmp_path / "train.beton").labels
    targets = {}
    for batch in loader.epoch(0):
        targets |= dict(zip(batch.indices.tolist(), batch.targets.tolist()))
    assert targets[11] == labels[12] and "train.beton[11]" in caplog.text
    evaluation = build_eval_loader(data, batch_size=4)
    assert sorted(i for batch in evaluation for i in batch.indices.tolist()) == [0, 1, 2, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_names_that_are_not_utf_8_are_reported_all_the_same(tmp_path):
    root = make_folder(tmp_path / "in", train=6, val=3)
    name = os.path.join(os.fsencode(root), b"train/class_0/bad\xff.jpg")
    Path(os.fsdecode(name)).write_bytes(b"")
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(Path(__file__).parents[2])}
    for arguments in (
        ("prepare_data.py", "folder", "--source", str(root), "--out", str(tmp_path / "out"), "--num-workers=1"),
        ("check_data.py", str(root), "--num-workers=1"),
    ):
        command = [sys.executable, f"scripts/{arguments[0]}", *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env=strict)
        assert r"bad\udcff.jpg: the file is" in " ".join(done.stdout.split()), done.stderr
    loader = build_train_loader(
        DataConfig(source="folder", path=str(root), image_size=16, num_workers=1),
        AugmentConfig(),
        seed=0,
        global_batch_size=7,
        micro_batch_size=7,
    )
    (batch,) = loader.epoch(0)
    assert len(batch) == 7 and len(loader.fingerprint) == 16
    loader.close()
    corrupt = CorruptImages("skip", 0.1)
    corrupt.start_epoch(10)
    corrupt.report(os.fsdecode(name), "the file is empty", "it is left out")
    assert all(found.endswith(r"bad\udcff.jpg") for found in corrupt.found)
