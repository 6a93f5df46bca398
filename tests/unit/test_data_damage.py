"""Images as people really have them: odd ones are read, broken ones are named, none hangs and none passes silently."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data import build_train_loader
from data.beton import open_beton
from data.conversion import WriteSettings, write_beton
from data.datasets import list_folder
from data.jpeg_check import jpeg_damage
from data.pixels import read_image
from mambavision.config import AugmentConfig, DataConfig
from tests.unit.data_samples import smooth_image


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
    assert sorted(item["path"] for item in manifest.unreadable) == UNREADABLE_NAMES
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
