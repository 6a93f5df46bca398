"""The manifest beside a .beton: what the file should hold, so that a wrong or damaged one is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.beton import Beton, partial_path
from data.class_names import class_names, first_difference

logger = logging.getLogger(__name__)
FORMAT = 1
MOST_CLASSES = 1_000_000  # of a file without a manifest: one flipped bit would have billions of them counted


@dataclass(frozen=True)
class Manifest:
    num_samples: int
    classes: list[str]  # names in the order of their numbers
    class_counts: list[int]
    num_bytes: int  # size of the .beton
    index_hash: str  # XXH3-64 of header, metadata and allocation table: always verified
    data_hash: str  # XXH3-64 of the stored images: verified by data.verify_checksum=true and scripts/check_data.py
    settings: dict[str, Any] = field(default_factory=dict)  # of the writing: resolution, quality, mode
    source: str = ""
    unreadable: list[dict[str, str]] = field(default_factory=list)  # left out: {"path": ..., "reason": ...}
    format: int = FORMAT


def manifest_path(beton: str | Path) -> Path:
    return Path(f"{beton}.json")


def names_path(beton: str | Path) -> Path:
    """One name a line, in the order of the samples: the bytes that the file system knows, line breaks within as \\n."""
    return Path(f"{beton}.names.txt")


def write_manifest(beton: str | Path, manifest: Manifest, names: Sequence[str]) -> None:
    write_atomically(names_path(beton), "".join(name.replace("\n", "\\n") + "\n" for name in names))
    write_atomically(manifest_path(beton), json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    partial = partial_path(path)
    try:
        with open(partial, "xb") as file:
            file.write(os.fsencode(text))  # a name need not be UTF-8
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(beton: str | Path) -> Manifest | None:
    """None where there is none. Raises ValueError for one that cannot be understood."""
    path = manifest_path(beton)
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of this project ({error}); write the data again") from error


def read_names(beton: str | Path) -> list[str] | None:
    path = names_path(beton)
    # By line feeds alone: splitlines would also take other characters of a name for ends of lines.
    return os.fsdecode(path.read_bytes()).removesuffix("\n").split("\n") if path.is_file() else None


def verify(beton: Beton, *, checksum: bool = False) -> Manifest:
    """Compare a file with its manifest. Raises ValueError for each difference.

    A file without a manifest (written by FFCV itself) is taken with a warning; its classes are numbered by its labels.
    """
    manifest = read_manifest(beton.path)
    if manifest is None:
        logger.warning("%s has no manifest beside it: its content cannot be verified", beton.path)
        return _manifest_of(beton)
    size = beton.path.stat().st_size
    problem = None
    if len(beton) != manifest.num_samples:
        problem = f"holds {len(beton)} samples, its manifest says {manifest.num_samples}"
    elif size != manifest.num_bytes:
        problem = f"has {size} bytes, its manifest says {manifest.num_bytes}"
    elif beton.index_hash != manifest.index_hash:
        problem = f"has other tables than its manifest says (checksum {beton.index_hash}, not {manifest.index_hash})"
    elif int(beton.labels.min()) < 0 or int(beton.labels.max()) >= len(manifest.classes):
        problem = f"has labels outside its {len(manifest.classes)} classes"
    elif checksum and beton.data_hash() != manifest.data_hash:
        problem = "has other image bytes than its manifest says (checksum)"
    if problem:
        raise ValueError(
            f"{beton.path} {problem}; copy it again, or write it again with scripts/prepare_data.py --force"
        )
    return manifest


def check_numbering(beton: Path, manifest: Manifest) -> None:
    """Compare the classes with those of the training file beside it. Raises ValueError where they are others."""
    training = read_manifest(beton.with_name("train.beton"))
    if training is None:
        return
    # Names that are numbers say nothing: those of a file without a manifest are, whatever its classes are called.
    if difference := first_difference(class_names(training.classes), class_names(manifest.classes)):
        raise ValueError(
            f"{beton} numbers its classes otherwise than train.beton beside it ({difference}); write both from one "
            "source with scripts/prepare_data.py --force"
        )


def _manifest_of(beton: Beton) -> Manifest:
    least, most = int(beton.labels.min()), int(beton.labels.max())
    if least < 0 or most >= MOST_CLASSES:
        raise ValueError(
            f"{beton.path} has labels from {least} to {most}, which are no class numbers: it is damaged, or holds something "
            "else; write it again with scripts/prepare_data.py"
        )
    counts = [int(n) for n in np.bincount(beton.labels)]
    return Manifest(
        num_samples=len(beton),
        classes=[str(number) for number in range(len(counts))],
        class_counts=counts,
        num_bytes=beton.path.stat().st_size,
        index_hash=beton.index_hash,
        data_hash="",
    )
