""".beton files: written whole or not at all, refused when they are not what they were."""

import json
import os
import signal
import time

import numpy as np
import pytest

from data.beton import ALLOCATION, HEADER, JPG, RAW, BetonWriter, EncodedImage, open_beton
from data.conversion import UnreadableImage, WriteSettings, encode, write_beton
from data.datasets import list_folder
from data.manifest import manifest_path, read_manifest, read_names, verify
from data.pixels import read_image
from tests.unit.data_samples import make_betons, make_folder, make_split, smooth_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    return make_betons(folder, tmp_path_factory.mktemp("betons"), write_mode="jpg") / "train.beton"


@pytest.fixture
def copy(written, tmp_path):
    """A .beton with its manifest that a test may damage."""
    path = tmp_path / "train.beton"
    path.write_bytes(written.read_bytes())
    manifest_path(path).write_text(manifest_path(written).read_text())
    return path


def test_what_is_written_is_read_back(folder, written):
    beton, source = open_beton(written), list_folder(folder / "train")
    manifest = verify(beton, checksum=True)
    assert (len(beton), manifest.classes) == (24, ["class_0", "class_1", "class_2"])
    assert manifest.class_counts == [8, 8, 8]
    assert read_names(written) == source.names
    np.testing.assert_array_equal(beton.labels, source.labels)
    for index in (0, 11, 23):
        stored, original = beton.stored(index), read_image(str(source.path(index)))
        assert (stored.width, stored.height) == original.size and stored.mode == JPG
        difference = np.abs(np.asarray(read_image(stored.data), dtype=int) - np.asarray(original, dtype=int))
        assert difference.mean() < 3.0  # re-encoded at quality 90


@pytest.mark.slow
def test_ffcv_itself_reads_the_file(written):
    reader = pytest.importorskip("ffcv.reader").Reader(str(written))
    assert reader.field_names == ["image", "label"] and reader.num_samples == 24
    np.testing.assert_array_equal(reader.metadata["f1"], open_beton(written).labels)
    assert len(reader.alloc_table) == 24


def test_equal_input_gives_equal_files_whatever_the_number_of_workers(folder, written, tmp_path):
    write_beton(list_folder(folder / "train"), tmp_path / "a.beton", WriteSettings(write_mode="jpg"), num_workers=2)
    assert (tmp_path / "a.beton").read_bytes() == written.read_bytes()


def test_write_modes(folder):
    content = (folder / "train" / "class_0" / "0000.jpg").read_bytes()
    assert encode(content, WriteSettings(write_mode="original"), 0) == EncodedImage(JPG, 40, 40, content)
    assert encode(content, WriteSettings(write_mode="raw"), 0).data == read_image(content).tobytes()
    assert encode(content, WriteSettings(write_mode="smart"), 0).mode == RAW, "40x40 px are small"
    assert encode(content, WriteSettings(write_mode="original", max_resolution=20), 0)[:3] == (JPG, 20, 20)
    large = smooth_image(0, 300, 200)
    assert encode(np.asarray(large), WriteSettings(write_mode="smart"), 0).mode == JPG
    modes = [encode(content, WriteSettings(write_mode="proportion", jpg_share=0.25), i).mode for i in range(200)]
    assert 25 < modes.count(JPG) < 75


def test_large_images_are_reduced_to_their_longer_side(tmp_path):
    image = encode(np.asarray(smooth_image(0, 900, 300)), WriteSettings(max_resolution=90), 0)
    assert (image.width, image.height) == (90, 30)


def test_an_image_that_does_not_fit_a_page_says_what_to_do(tmp_path):
    writer = BetonWriter(tmp_path / "x.beton", max_samples=1)
    with pytest.raises(ValueError, match="--max-resolution"):
        writer.add(EncodedImage(RAW, 1000, 1000, bytes(3_000_000)), 0)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def damage(path, where: slice | int, replacement: bytes):
    content = bytearray(path.read_bytes())
    content[where if isinstance(where, slice) else slice(where, where + len(replacement))] = replacement
    path.write_bytes(bytes(content))


def table_start(path) -> int:
    return int(np.frombuffer(path.read_bytes()[: HEADER.itemsize], HEADER)["alloc_table_ptr"][0])


DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "ends before its tables do"),
    "ten bytes": (lambda p: p.write_bytes(p.read_bytes()[:10]), "ends before its tables do"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2]), "allocation table is cut"),
    "last bytes": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "allocation table is cut"),
    "last rows": (lambda p: p.write_bytes(p.read_bytes()[: -10 * ALLOCATION.itemsize]), "14 stored values for 24"),
    "no table": (lambda p: p.write_bytes(p.read_bytes()[: table_start(p)]), "0 stored values for 24"),
    "not finished": (lambda p: damage(p, 16, bytes(8)), "interrupted"),
    "another format": (lambda p: p.write_bytes(b"\x89PNG" * 1000), "not a .beton"),
    "wild pointer": (
        lambda p: damage(p, len(p.read_bytes()) - 16, b"\xff" * 8),
        "that no entry|outside the data region",
    ),
    "wild size": (lambda p: damage(p, len(p.read_bytes()) - 8, b"\xff" * 8), "outside the data region"),
    "a label": (lambda p: damage(p, HEADER.itemsize + 2 * 1041 + 16, b"\x02"), "other tables than its manifest"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_at_opening(kind, copy):
    apply, message = DAMAGES[kind]
    apply(copy)
    with pytest.raises(ValueError, match=message):
        verify(open_beton(copy))


def test_flipped_image_bytes_are_found_by_the_checksum(copy):
    damage(copy, open_beton(copy).data_start + 500, b"\x00\x01\x02\x03")
    verify(open_beton(copy))
    with pytest.raises(ValueError, match="image bytes"):
        verify(open_beton(copy), checksum=True)


def test_another_file_under_the_same_name_is_refused(copy, tmp_path):
    make_betons(make_folder(tmp_path / "other", train=25), tmp_path)
    manifest_path(tmp_path / "train.beton").write_text(json.dumps({**vars(read_manifest(copy)), "num_samples": 24}))
    with pytest.raises(ValueError, match="holds 25 samples, its manifest says 24"):
        verify(open_beton(tmp_path / "train.beton"))


def test_a_file_of_ffcvs_own_writer_is_taken_with_a_warning(copy, caplog):
    manifest_path(copy).unlink()
    assert verify(open_beton(copy)).classes == ["0", "1", "2"]
    assert "no manifest" in caplog.text


def test_unreadable_images_are_left_out_and_named(tmp_path):
    split = make_split(tmp_path, "train", 9)
    (split / "class_1" / "0001.jpg").write_bytes(b"not an image")
    (split / "class_2" / "0005.jpg").write_bytes((split / "class_2" / "0002.jpg").read_bytes()[:400])
    manifest = write_beton(list_folder(split), tmp_path / "t.beton", WriteSettings(), num_workers=1)
    assert [item["path"] for item in manifest.unreadable] == ["class_1/0001.jpg", "class_2/0005.jpg"]
    assert manifest.num_samples == 7 and manifest.class_counts == [3, 2, 2]
    assert "class_1/0001.jpg" not in read_names(tmp_path / "t.beton")
    with pytest.raises(UnreadableImage, match=r"class_1/0001\.jpg"):
        write_beton(list_folder(split), tmp_path / "u.beton", WriteSettings(), num_workers=1, on_unreadable="stop")
    assert not list(tmp_path.glob("u.beton*"))


class Deadly:
    """A source whose fifth image kills the process that reads it, as the kernel does when memory runs out."""

    def __init__(self):
        self.names = [str(n) for n in range(200)]
        self.labels = np.zeros(200, dtype=np.int64)
        self.classes = ["a"]
        self.origin = "a test"

    def read(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((4, 4, 3), dtype=np.uint8)


def test_a_dead_worker_ends_the_writing(tmp_path):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="worker process died"):
        write_beton(Deadly(), tmp_path / "t.beton", WriteSettings(), num_workers=2)
    assert time.monotonic() - started < 20 and list(tmp_path.iterdir()) == []


def test_a_damaged_label_of_a_file_without_a_manifest_is_refused_and_not_counted_up_to(tmp_path):
    """A flipped bit makes a label of billions, and as many classes."""
    writer = BetonWriter(tmp_path / "t.beton", max_samples=2)
    for label in (0, 1 << 32):
        writer.add(EncodedImage(RAW, 1, 1, bytes(3)), label)
    writer.complete()
    writer.publish()
    with pytest.raises(ValueError, match="labels from 0 to 4294967296"):
        verify(open_beton(tmp_path / "t.beton"))
