"""Decode every sample of a data set once, before any GPU hours are spent on it.

    python scripts/check_data.py DIR              DIR holds train.beton and val.beton, or train/ and val/ folders
    python scripts/check_data.py DIR --json report.json --contact-sheet sheet.png

Reports, per split: images per class, sizes, duplicates (equal bytes), grey and rotated images, and every image that
cannot be read, by name. A .beton is also compared with all of its manifest. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.batch import workers_per_rank
from data.beton import RAW, EncodedImage, open_beton
from data.folder import split_source
from data.jpeg_check import jpeg_damage
from data.manifest import check_numbering, read_names, verify
from data.pixels import UNREADABLE, opened, read_image, why_unreadable
from mambavision.config import DataConfig

ORIENTATION_TAG = 0x0112
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 10, 6, 96
console = Console(highlight=False)


@dataclass
class Report:
    split: str
    source: str
    images: int
    classes: int
    problems: list[str] = field(default_factory=list)  # what makes the exit code 1
    unreadable: dict[str, str] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)  # groups of names with equal bytes
    class_counts: dict[str, int] = field(default_factory=dict)
    width: tuple[int, float, int] = (0, 0.0, 0)  # least, mean, most, px
    height: tuple[int, float, int] = (0, 0.0, 0)
    megabytes: float = 0.0
    grey: int = 0
    rotated: int = 0  # with an EXIF orientation, which loaders ignore


@dataclass(slots=True)
class Looked:
    """What one look at a sample found."""

    digest: bytes
    num_bytes: int
    size: tuple[int, int] = (0, 0)
    grey: bool = False
    rotated: bool = False
    error: str = ""
    thumbnail: Image.Image | None = None  # of the samples on the contact sheet


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="directory with .beton files, or with class folders below train/ and val/")
    parser.add_argument("--split", action="append", help="only this split (may be repeated; default: train and val)")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--contact-sheet", help="write a PNG of some samples of each class (per split: -train, -val)")
    parser.add_argument("--num-workers", type=int, help="threads (default: all cores)")
    args = parser.parse_args(arguments)
    args.split = args.split or ["train", "val"]
    try:
        check_outputs(args)
        args.num_workers = workers_per_rank(args.num_workers, "--num-workers")
    except ValueError as error:
        print(f"check_data: {error}", file=sys.stderr)
        return 2
    reports = []
    for split in args.split:
        try:
            reports.append(check_split(Path(args.path).expanduser(), split, args))
        except (ValueError, OSError) as error:
            reports.append(Report(split, str(args.path), 0, 0, problems=[str(error)]))
        show(reports[-1])
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return int(any(report.problems for report in reports))


def check_outputs(args: argparse.Namespace) -> None:
    """Before hours of decoding, not after them.

    Raises:
        ValueError: a path that cannot be written, with what to give.
    """
    if args.json:
        check_writable("--json", Path(args.json))
    if args.contact_sheet:
        if Path(args.contact_sheet).suffix.lower() != ".png":
            raise ValueError(f"--contact-sheet {args.contact_sheet}: give a name that ends in .png, e.g. sheet.png")
        for split in args.split:
            check_writable("--contact-sheet", sheet_path(args.contact_sheet, split))


def check_writable(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{option}: the directory {path.parent} does not exist; make it, or give another path")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a directory; give the name of a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option}: {path} cannot be written; give a path in a directory of yours")


def sheet_path(given: str, split: str) -> Path:
    return Path(given).with_stem(f"{Path(given).stem}-{split}")


def check_split(root: Path, split: str, args: argparse.Namespace) -> Report:
    beton_path = root / f"{split}.beton"
    if beton_path.exists():
        beton = open_beton(beton_path)
        names = read_names(beton_path) or [f"{beton_path.name}[{index}]" for index in range(len(beton))]
        labels, source = beton.labels, str(beton_path)
        classes = verify(beton).classes
        read: Callable[[int], EncodedImage | bytes] = beton.stored
    else:
        folder = split_source(DataConfig(source="folder", path=str(root)), split)
        names, labels, classes, source, read = folder.names, folder.labels, folder.classes, folder.origin, folder.read
    report = Report(split, source, len(names), len(classes))
    if beton_path.exists():
        try:
            check_numbering(beton_path, verify(beton, checksum=True))
        except ValueError as error:
            report.problems.append(str(error))
    shown = on_contact_sheet(labels) if args.contact_sheet else {}
    looked = look_at_all(read, len(names), args.num_workers, split, set(shown))
    summarise(report, looked, names, labels, classes)
    if args.contact_sheet:
        contact_sheet(looked, shown, sheet_path(args.contact_sheet, split))
    return report


def look_at_all(read: Callable, count: int, threads: int, title: str, shown: set[int]) -> list[Looked]:
    def look(index: int) -> Looked:
        try:
            content = read(index)
        except OSError as error:
            return Looked(digest=b"", num_bytes=0, error=why_unreadable(error))
        found, image = look_at(content)
        found.thumbnail = image if index in shown else None
        return found

    with Progress(console=console) as bar, ThreadPoolExecutor(threads) as pool:
        looked = in_order(pool, look, count, ahead=8 * threads)
        return list(bar.track(looked, total=count, description=title))


def in_order(pool: Executor, look: Callable[[int], Looked], count: int, *, ahead: int) -> Iterator[Looked]:
    """look(0) to look(count - 1); `ahead` of them at most are in the pool, as each takes about 1.6 kB there."""
    indices = iter(range(count))
    pending = deque(pool.submit(look, index) for index in itertools.islice(indices, ahead))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(look, index) for index in itertools.islice(indices, 1))


def look_at(content: EncodedImage | bytes) -> tuple[Looked, Image.Image | None]:
    """What there is to say about a sample, and a thumbnail of it."""
    data = content.data if isinstance(content, EncodedImage) else content
    found = Looked(digest=hashlib.blake2b(data, digest_size=16).digest(), num_bytes=len(data))
    try:
        if isinstance(content, EncodedImage) and content.mode == RAW:
            image = Image.frombytes("RGB", (content.width, content.height), data)
        else:
            image = read_image(data)
            with opened(data) as header:
                found.rotated = header.getexif().get(ORIENTATION_TAG, 1) != 1
            if damage := jpeg_damage(data):
                found.error = damage
    except UNREADABLE as error:
        found.error = why_unreadable(error)
        return found, None
    if isinstance(content, EncodedImage) and image.size != (content.width, content.height):
        found.error = f"is {image.width}x{image.height} px, the file says {content.width}x{content.height}"
    found.size = image.size
    image.thumbnail((SHEET_SIDE, SHEET_SIDE))
    pixels = np.asarray(image, dtype=np.int16)
    found.grey = bool((pixels.max(axis=2) - pixels.min(axis=2)).max() <= 8)
    return found, image


def summarise(report: Report, looked: list[Looked], names: list[str], labels: np.ndarray, classes: list[str]) -> None:
    report.unreadable = {name: item.error for name, item in zip(names, looked) if item.error}
    if report.unreadable:
        report.problems.append(f"{len(report.unreadable)} images cannot be read")
    by_content: dict[bytes, list[str]] = {}
    for name, item in zip(names, looked):
        by_content.setdefault(item.digest, []).append(name)
    report.duplicates = [group for digest, group in by_content.items() if len(group) > 1 and digest]
    counts = np.bincount(labels, minlength=len(classes))
    report.class_counts = {name: int(count) for name, count in zip(classes, counts)}
    if empty := [name for name, count in report.class_counts.items() if count == 0]:
        report.problems.append(f"{len(empty)} classes have no image, for instance {empty[0]}")
    sizes = np.array([item.size for item in looked if not item.error])
    if len(sizes):
        for axis, name in enumerate(("width", "height")):
            values = sizes[:, axis]
            setattr(report, name, (int(values.min()), round(float(values.mean()), 1), int(values.max())))
    report.megabytes = round(sum(item.num_bytes for item in looked) / 1e6, 1)
    report.grey = sum(item.grey for item in looked)
    report.rotated = sum(item.rotated for item in looked)


def show(report: Report) -> None:
    counts = list(report.class_counts.values()) or [0]
    table = Table(title=f"{report.split}: {report.source}", show_header=False, title_justify="left")
    rows = {
        "images": f"{report.images} ({report.megabytes} MB)",
        "classes": f"{report.classes}, {min(counts)} to {max(counts)} images each",
        "width": f"{report.width[0]} to {report.width[2]} px, mean {report.width[1]}",
        "height": f"{report.height[0]} to {report.height[2]} px, mean {report.height[1]}",
        "grey": str(report.grey),
        "with an EXIF orientation (ignored)": str(report.rotated),
        "groups of duplicates": str(len(report.duplicates)),
        "unreadable": str(len(report.unreadable)),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if len(set(counts)) > 1:
        console.print("images per class: " + histogram(counts))
    for group in report.duplicates[:5]:
        console.print("  equal: " + ", ".join(group[:4]), markup=False)
    for name, reason in list(report.unreadable.items())[:20]:
        console.print(f"  unreadable: {name}: {reason}", style="yellow", markup=False)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False)


def histogram(counts: list[int], bins: int = 8) -> str:
    """Classes by their number of images, as text."""
    edges = np.unique(np.linspace(min(counts), max(counts) + 1, bins + 1).round().astype(int))
    numbers, _ = np.histogram(counts, bins=edges)
    spans = [f"{low}-{high - 1}: {number} classes" for low, high, number in zip(edges, edges[1:], numbers) if number]
    return "; ".join(spans)


def on_contact_sheet(labels: np.ndarray) -> dict[int, tuple[int, int]]:
    """Sample -> (column, row): the first few samples of classes spread over all, one column a class."""
    columns = np.unique(np.linspace(0, labels.max(), SHEET_COLUMNS).round().astype(int))
    return {
        int(sample): (column, row)
        for column, label in enumerate(columns)
        for row, sample in enumerate(np.flatnonzero(labels == label)[:SHEET_ROWS])
    }


def contact_sheet(looked: list[Looked], shown: dict[int, tuple[int, int]], path: Path) -> None:
    sheet = Image.new("RGB", (SHEET_COLUMNS * SHEET_SIDE, SHEET_ROWS * SHEET_SIDE), (32, 32, 32))
    for sample, (column, row) in shown.items():
        if looked[sample].thumbnail is not None:
            sheet.paste(looked[sample].thumbnail, (column * SHEET_SIDE, row * SHEET_SIDE))
    sheet.save(path)
    console.print(f"contact sheet: {path}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    sys.exit(main())
