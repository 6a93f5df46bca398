"""Where images come from before they are in a .beton: class folders, Fashion-MNIST, ImageNet's archives.

A source knows names, labels and classes up front and reads one image at a time, in any process. Nothing is unpacked.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from data.names import Names

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EVAL_SPLITS = {"val": ("val", "validation", "valid", "test"), "train": ("train",), "test": ("test",)}


class Source(Protocol):
    names: Sequence[str]
    labels: np.ndarray  # (N,) int64
    classes: list[str]
    origin: str  # for the manifest

    def read(self, index: int) -> bytes | np.ndarray: ...


@dataclass
class FolderSource:
    """Image files in one folder per class; classes are numbered by sorted folder name, as in torchvision."""

    root: Path
    names: Sequence[str]  # kept as Names
    labels: np.ndarray
    classes: list[str]

    def __post_init__(self) -> None:
        self.names = Names(self.names)

    @property
    def origin(self) -> str:
        return str(self.root.absolute())

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def read(self, index: int) -> bytes:
        return self.path(index).read_bytes()


def find_split(root: str | Path, split: str, setting: str = "data.path") -> Path:
    """The folder of a split below `root`: val may also be called validation, valid or test."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"{setting}={root} is not a directory")
    for name in EVAL_SPLITS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    found = sorted(entry.name for entry in root.iterdir())[:8]
    wanted = " or ".join(f"{name}/" for name in EVAL_SPLITS.get(split, (split,)))
    raise ValueError(f"{root} has no {wanted}; it holds {', '.join(found) or 'nothing'}")


def list_folder(root: str | Path, *, classes: list[str] | None = None) -> FolderSource:
    """Every image file below the class folders of `root`, sorted. `classes` fixes the numbering (for evaluation).

    Hidden files and folders are passed over: .ipynb_checkpoints/ holds copies, ._x.jpg of an archive from a Mac no image.
    """
    root = Path(root)
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{root} has no class folders; images are expected as {root}/<class>/<image>.jpg")
    if classes is None:
        classes = found
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f"{root} has classes that training does not know: {', '.join(unknown[:5])}")
    names, labels = [], []
    for number, name in enumerate(classes):
        for directory, folders, files in os.walk(root / name, followlinks=True, onerror=_cannot_list):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            for folder in folders:
                _check_link(os.path.join(directory, folder))
            inside = [f for f in sorted(files) if f.lower().endswith(IMAGE_SUFFIXES) and not f.startswith(".")]
            names += [os.path.relpath(os.path.join(directory, file), root) for file in inside]
            labels += [number] * len(inside)
    if not names:
        raise ValueError(f"{root} has class folders but no images in them ({', '.join(IMAGE_SUFFIXES)})")
    return FolderSource(root, names, np.array(labels, dtype=np.int64), list(classes))


def _check_link(folder: str) -> None:
    """Through a link to a folder that holds it, the same images would be found again and again."""
    if os.path.islink(folder):
        target, here = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
        if os.path.commonpath([target, here]) == target:
            raise ValueError(f"{folder} is a link to {target}, which holds it; remove the link")


def _cannot_list(error: OSError) -> None:
    """os.walk passes over such a directory without a word: a class less, and nobody knows."""
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}; mend its permissions or its file system")


FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
]
FASHION_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass
class ArraySource:
    """Images already in memory, (N, H, W) grey or (N, H, W, 3) uint8."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    origin: str
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = self.names or [f"{index:06d}" for index in range(len(self.labels))]

    def read(self, index: int) -> np.ndarray:
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def fashion_mnist(directory: str | Path, split: str) -> ArraySource:
    """Fashion-MNIST (Xiao et al. 2017) from its four idx files; `val` are the 10 000 test images."""
    images, labels = (_read_idx(Path(directory) / name) for name in FASHION_FILES[split])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{directory} holds {images.shape} images and {labels.shape} labels: not Fashion-MNIST")
    origin = f"Fashion-MNIST {split} from {Path(directory).absolute()}"
    return ArraySource(images, labels.astype(np.int64), FASHION_CLASSES, origin)


def _read_idx(path: Path) -> np.ndarray:
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} is damaged: {values.size} values, its header says {shape}")
    return values.reshape(shape)


@dataclass
class TarSource:
    """Images inside an uncompressed tar, read where they lie."""

    archive: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str]
    offsets: np.ndarray  # (N,) first byte of each file in the archive
    sizes: np.ndarray
    _file: IO[bytes] | None = None

    @property
    def origin(self) -> str:
        return str(self.archive.absolute())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}  # each process opens its own

    def read(self, index: int) -> bytes:
        if self._file is None:
            self._file = open(self.archive, "rb")  # noqa: SIM115 (kept for the life of the process)
        content = os.pread(self._file.fileno(), int(self.sizes[index]), int(self.offsets[index]))
        if len(content) != self.sizes[index]:
            raise OSError(f"{self.archive} ends inside {self.names[index]}")
        return content


def imagenet_train(archive: str | Path) -> TarSource | FolderSource:
    """ILSVRC2012_img_train.tar: one tar per class (its name is the WordNet id) inside a tar; or class folders."""
    archive = Path(archive)
    if archive.is_dir():
        return list_folder(archive)
    members, classes = [], []
    with _open_tar(archive) as outer:
        inner_tars = sorted((m for m in outer if m.isfile() and m.name.endswith(".tar")), key=lambda m: m.name)
        if not inner_tars:
            raise ValueError(f"{archive} holds no class archives (n01440764.tar, ...): not ILSVRC2012_img_train.tar")
        for number, member in enumerate(inner_tars):
            classes.append(Path(member.name).stem)
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                found = sorted((m.name, member.offset_data + m.offset_data, m.size) for m in inner if m.isfile())
            members += [(f"{classes[-1]}/{name}", number, offset, size) for name, offset, size in found]
    return _tar_source(archive, members, classes)


def imagenet_val(archive: str | Path, labels: dict[str, str], classes: list[str]) -> TarSource | FolderSource:
    """ILSVRC2012_img_val.tar, or its images in one flat directory.

    `labels` maps file names to WordNet ids, `classes` gives their numbers.
    """
    archive = Path(archive)
    number = {name: index for index, name in enumerate(classes)}

    def label(name: str) -> int:
        if name not in labels:
            raise ValueError(f"{archive}: {name} has no label in the devkit or label file")
        if labels[name] not in number:
            raise ValueError(f"{archive}: {name} is of class {labels[name]}, which the training set does not have")
        return number[labels[name]]

    if archive.is_dir():
        names = sorted(entry.name for entry in archive.iterdir() if entry.name.lower().endswith(IMAGE_SUFFIXES))
        if not names:
            raise ValueError(f"{archive} holds no images; class folders are a case for prepare_data.py folder")
        return FolderSource(archive, names, np.array([label(name) for name in names], dtype=np.int64), classes)
    with _open_tar(archive) as tar:
        files = sorted((Path(m.name).name, m.offset_data, m.size) for m in tar if m.isfile())
    return _tar_source(archive, [(name, label(name), offset, size) for name, offset, size in files], classes)


def _tar_source(archive: Path, members: list[tuple[str, int, int, int]], classes: list[str]) -> TarSource:
    if not members:
        raise ValueError(f"{archive} holds no images")
    names, labels, offsets, sizes = zip(*members)
    as_int64 = (np.array(values, dtype=np.int64) for values in (labels, offsets, sizes))
    return TarSource(archive, list(names), next(as_int64), classes, next(as_int64), next(as_int64))


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, mode="r:")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}") from error


def imagenet_val_labels(source: str | Path) -> dict[str, str]:
    """File name -> WordNet id of the 50 000 validation images.

    From the devkit (ILSVRC2012_devkit_t12.tar.gz or its unpacked directory), Kaggle's LOC_val_solution.csv, a file with
    `name id` a line, or one with an id a line in the order of the images.
    """
    source = Path(source)
    if source.is_dir() or source.name.endswith(".tar.gz"):
        return _devkit_labels(source)
    lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    labels: dict[str, str] = {}
    for position, line in enumerate(lines):
        words = re.split(r"[\s,]+", line)
        if words[0] == "ImageId":
            continue
        if re.fullmatch(r"n\d{8}", words[0]):
            labels[_val_name(position + 1)] = words[0]
        elif len(words) > 1 and re.fullmatch(r"n\d{8}", words[1]):
            labels[words[0] if words[0].lower().endswith(IMAGE_SUFFIXES) else f"{words[0]}.JPEG"] = words[1]
        else:
            raise ValueError(f"{source}, line {position + 1}: {line!r} is neither `n01440764` nor `name n01440764`")
    return labels


def _val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def _devkit_labels(source: Path) -> dict[str, str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(
            f"reading {source} takes scipy (its class list is a MATLAB file): pip install scipy, "
            "or give a label file with one WordNet id a line instead"
        ) from error
    meta, truth = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
    if source.is_dir():
        opened = {name: open(source / name, "rb") for name in (meta, truth)}  # noqa: SIM115
    else:
        tar = tarfile.open(source)  # noqa: SIM115
        opened = {name: tar.extractfile(f"ILSVRC2012_devkit_t12/{name}") for name in (meta, truth)}
    synsets = loadmat(opened[meta], squeeze_me=True)["synsets"]
    wordnet_id = {int(row[0]): str(row[1]) for row in synsets}
    numbers = [int(line) for line in opened[truth].read().decode().split()]
    return {_val_name(position + 1): wordnet_id[number] for position, number in enumerate(numbers)}
