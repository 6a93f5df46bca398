"""Fashion-MNIST and ImageNet's archives, small and made on the spot in the layouts of the real ones."""

import gzip
import io
import os
import shutil
import struct
import sys
import tarfile

import numpy as np
import pytest

from data.beton import RAW, open_beton
from data.conversion import WriteSettings, write_beton
from data.datasets import fashion_mnist, imagenet_train, imagenet_val, imagenet_val_labels, list_folder
from data.manifest import manifest_path, read_manifest, read_names
from scripts.prepare_data import main
from tests.unit.data_samples import make_folder, make_split, smooth_image


def write_idx(path, values):
    content = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content))


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 25), ("t10k", 12)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_fashion_mnist_is_stored_uncompressed_in_colour(fashion, capsys):
    assert main(["fashion_mnist", "--source", str(fashion), "--out", str(fashion / "out"), "--num-workers", "1"]) == 0
    beton, source = open_beton(fashion / "out" / "val.beton"), fashion_mnist(fashion, "val")
    assert len(beton) == 12 and read_manifest(beton.path).classes[9] == "Ankle boot"
    stored = beton.stored(5)
    assert (stored.mode, stored.width, stored.height) == (RAW, 28, 28)
    np.testing.assert_array_equal(np.frombuffer(stored.data, np.uint8).reshape(28, 28, 3)[:, :, 1], source.images[5])
    assert beton.path.stat().st_size < 6e6


def test_a_damaged_idx_file_is_named(fashion):
    path = fashion / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="t10k-images"):
        fashion_mnist(fashion, "val")


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    smooth_image(number, 40, 30).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(path, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if path:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def imagenet(tmp_path):
    classes = {
        wordnet: tar_of(None, {f"{wordnet}_{n}.JPEG": jpeg(10 * c + n) for n in range(3)})
        for c, wordnet in enumerate(("n01443537", "n01440764"))
    }
    tar_of(tmp_path / "train.tar", {f"{wordnet}.tar": content for wordnet, content in classes.items()})
    tar_of(tmp_path / "val.tar", {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(50 + n) for n in (3, 1, 2)})
    (tmp_path / "labels.txt").write_text("n01443537\nn01440764\nn01443537\n")
    return tmp_path


def test_imagenets_archives_are_read_without_unpacking(imagenet):
    source = imagenet_train(imagenet / "train.tar")
    assert source.classes == ["n01440764", "n01443537"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.names[0] == "n01440764/n01440764_0.JPEG"
    assert [source.read(index) for index in range(6)] == [jpeg(n) for n in (10, 11, 12, 0, 1, 2)]


def test_imagenet_from_tars_to_betons(imagenet, capsys):
    command = ["imagenet", "--train-tar", str(imagenet / "train.tar"), "--val-tar", str(imagenet / "val.tar")]
    assert main([*command, "--devkit", str(imagenet / "labels.txt"), "--out", str(imagenet), "--num-workers", "1"]) == 0
    assert open_beton(imagenet / "train.beton").labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert open_beton(imagenet / "val.beton").labels.tolist() == [1, 0, 1]
    assert read_names(imagenet / "val.beton")[0] == "ILSVRC2012_val_00000001.JPEG"
    assert main([*command, "--out", str(imagenet / "b")]) == 1 and "--devkit" in capsys.readouterr().out


def test_imagenet_unpacked_gives_the_same_samples(imagenet):
    for name in ("train", "val"):
        with tarfile.open(imagenet / f"{name}.tar") as tar:
            tar.extractall(imagenet / name, filter="data")
    for archive in (imagenet / "train").glob("*.tar"):
        with tarfile.open(archive) as tar:
            tar.extractall(archive.with_suffix(""), filter="data")
        archive.unlink()
    packed, unpacked = imagenet_train(imagenet / "train.tar"), imagenet_train(imagenet / "train")
    labels = imagenet_val_labels(imagenet / "labels.txt")
    pairs = [(packed, unpacked)]
    pairs.append(tuple(imagenet_val(imagenet / name, labels, packed.classes) for name in ("val.tar", "val")))
    for tar_source, folder_source in pairs:
        assert (tar_source.names, tar_source.classes) == (folder_source.names, folder_source.classes)
        assert tar_source.labels.tolist() == folder_source.labels.tolist()
        assert tar_source.read(1) == folder_source.read(1)


@pytest.mark.parametrize(
    "text",
    [
        "n01443537\nn01440764\n",
        "ILSVRC2012_val_00000001.JPEG n01443537\nILSVRC2012_val_00000002.JPEG n01440764\n",
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 1 2 3\nILSVRC2012_val_00000002,n01440764 5 6\n",
    ],
    ids=["ids in order", "names and ids", "Kaggle"],
)
def test_validation_labels_come_in_several_forms(text, tmp_path):
    (tmp_path / "labels").write_text(text)
    assert imagenet_val_labels(tmp_path / "labels") == {
        "ILSVRC2012_val_00000001.JPEG": "n01443537",
        "ILSVRC2012_val_00000002.JPEG": "n01440764",
    }


def test_a_validation_class_that_training_lacks_is_named(imagenet):
    labels = imagenet_val_labels(imagenet / "labels.txt")
    with pytest.raises(ValueError, match="n01443537"):
        imagenet_val(imagenet / "val.tar", labels, ["n01440764"])


def test_the_devkit_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match="pip install scipy"):
        imagenet_val_labels(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["folder", "--source", "/nowhere"], "--source=/nowhere is not a directory"),
        (["imagenet"], "--train-tar"),
        (["folder", "--source", "FOLDER", "--quality", "500"], "1 to 100"),
        (["folder", "--source", "FOLDER", "--jpg-share", "7"], "from 0 to 1"),
        (["folder", "--source", "FOLDER", "--num-workers", "0"], "--num-workers=0 has to be at least 1"),
    ],
)
def test_slips_are_answered_with_advice(arguments, advice, tmp_path, capsys):
    folder = make_folder(tmp_path / "in", train=3, val=3)
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert advice in " ".join(capsys.readouterr().out.split())


def test_a_second_run_leaves_what_is_there_and_force_writes_it_again(tmp_path, capsys):
    command = [
        "folder",
        "--source",
        str(make_folder(tmp_path / "in", train=6, val=3)),
        "--out",
        str(tmp_path),
        "--num-workers=1",
    ]
    assert main(command) == 0
    written = (tmp_path / "train.beton").stat().st_mtime_ns
    assert main(command) == 0 and "already there" in capsys.readouterr().out
    assert (tmp_path / "train.beton").stat().st_mtime_ns == written
    assert main([*command, "--force"]) == 0 and (tmp_path / "train.beton").stat().st_mtime_ns > written
    (tmp_path / "train.beton").write_bytes((tmp_path / "train.beton").read_bytes()[:-9])
    assert main(command) == 1 and "--force" in capsys.readouterr().out


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The arguments that wrote tmp_path/train.beton and val.beton from a folder, given by a relative path."""
    make_folder(tmp_path / "in", train=6, val=3)
    monkeypatch.chdir(tmp_path)
    arguments = ["folder", "--source", "in", "--out", str(tmp_path), "--num-workers=1"]
    assert main(arguments) == 0
    return arguments


def answer(arguments, capsys) -> tuple[int, str]:
    capsys.readouterr()
    code = main(arguments)
    return code, " ".join(capsys.readouterr().out.split())


def test_a_file_without_a_manifest_is_not_written_over_unless_forced(prepared, tmp_path, capsys):
    beton = tmp_path / "train.beton"
    manifest_path(beton).unlink()
    written = beton.stat().st_mtime_ns
    code, said = answer(prepared, capsys)
    assert code == 1 and "without a manifest" in said and "another --out, or --force" in said
    assert beton.stat().st_mtime_ns == written
    assert main([*prepared, "--force"]) == 0 and read_manifest(beton).num_samples == 6


def test_a_file_of_another_source_is_not_taken_for_this_one(prepared, fashion, tmp_path, capsys):
    code, said = answer(["fashion_mnist", "--source", str(fashion), "--out", str(tmp_path)], capsys)
    assert code == 1 and "another --out, or --force" in said
    said = said.replace(" ", "")  # long paths are broken at the width of the console
    assert f"writtenfrom{tmp_path / 'in' / 'train'},notfromFashion-MNISTtrainfrom{fashion}" in said


def test_one_source_by_another_name_is_the_same_source(prepared, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for name in (tmp_path / "in", tmp_path / "link", f"{tmp_path}/link/../in/"):
        code, said = answer(["folder", "--source", str(name), *prepared[3:]], capsys)
        assert code == 0 and said.count("already there") == 2 and "was written with" not in said


def test_a_file_of_other_settings_is_left_with_a_warning_that_says_which(prepared, capsys):
    code, said = answer([*prepared, "--quality", "50", "--max-resolution", "0"], capsys)
    assert code == 0 and "max_resolution 500, not None; quality 90, not 50: --force" in said


def test_a_class_folder_that_cannot_be_listed_is_an_error_and_not_a_class_less(tmp_path, monkeypatch):
    """Permissions, or a network file system that is away for a moment."""
    root, honest = make_split(tmp_path, "train", 6), os.scandir

    def scandir(path):
        if str(path).endswith("class_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="class_1 cannot be read: Permission denied"):
        list_folder(root)


def test_a_source_that_has_changed_since_is_told_with_what(prepared, tmp_path, capsys):
    (tmp_path / "in/train/class_1").rename(tmp_path / "in/train/zebra")
    shutil.copy(tmp_path / "in/train/class_0/0000.jpg", tmp_path / "in/train/class_0/0006.jpg")
    (tmp_path / "in/val/class_1").rename(tmp_path / "in/val/zebra")
    code, said = answer(prepared, capsys)
    assert code == 0 and "class 1 was 'class_1', is 'class_2'; 6 images, which are 7 now: --force" in said


def test_a_val_file_written_later_is_numbered_by_the_train_file_that_is_there(imagenet, tmp_path):
    """Of a part of ImageNet's classes, say, while the label file knows all of them."""
    out = ["--out", str(tmp_path), "--num-workers=1"]
    assert main(["imagenet", "--train-tar", str(imagenet / "train.tar"), *out]) == 0
    with open(imagenet / "labels.txt", "a") as labels:
        labels.write("n00000001\n")
    val = ["--val-tar", str(imagenet / "val.tar"), "--devkit", str(imagenet / "labels.txt")]
    assert main(["imagenet", *val, *out]) == 0
    assert read_manifest(tmp_path / "val.beton").classes == read_manifest(tmp_path / "train.beton").classes


def test_hidden_files_and_folders_are_no_images(tmp_path):
    """What notebooks and archives from a Mac leave behind: copies, and resource forks under the images' names."""
    root = make_split(tmp_path, "train", 6)
    names = list(list_folder(root).names)
    (root / "class_0/.ipynb_checkpoints").mkdir()
    shutil.copy(root / names[0], root / "class_0/.ipynb_checkpoints/0000-checkpoint.jpg")
    (root / "class_0/._0000.jpg").write_bytes(b"\0\5\x16\7")
    assert list(list_folder(root).names) == names


def test_a_link_to_a_folder_above_is_refused_and_others_are_followed(tmp_path):
    root = make_split(tmp_path, "train", 6)
    make_split(tmp_path, "elsewhere", 6)
    (root / "class_0/more").symlink_to(tmp_path / "elsewhere/class_0")
    assert len(list_folder(root).names) == 8
    (root / "class_1/loop").symlink_to("..")
    with pytest.raises(ValueError, match="loop is a link to .*train, which holds it"):
        list_folder(root)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take only UTF-8")
def test_names_of_any_characters_are_kept_each_on_its_line(tmp_path):
    root = make_split(tmp_path / "in", "train", 3)
    odd = [
        b"not utf-8 \xff",
        b"two\nlines",
        b"return\r",
        "next\x85 \u2028 line".encode(),
        "猫 ü".encode(),
        b"back\\slash",
    ]
    for name in odd:
        shutil.copy(root / "class_0/0000.jpg", os.path.join(os.fsencode(root / "class_0"), name + b".jpg"))
    source = list_folder(root)
    write_beton(source, tmp_path / "t.beton", WriteSettings(), num_workers=1)
    assert read_names(tmp_path / "t.beton") == [name.replace("\n", "\\n") for name in source.names]
