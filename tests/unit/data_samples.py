"""Small image folders and .beton files for the data tests, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.conversion import WriteSettings, write_beton
from data.datasets import list_folder


def smooth_image(number: int, width: int, height: int) -> Image.Image:
    """A picture of soft colour blobs, different for each number: what a JPEG keeps nearly as it is."""
    cells = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def make_split(root: Path, split: str, count: int, *, classes: int = 3, sizes: tuple[int, ...] = (40, 56, 64)) -> Path:
    for number in range(count):
        folder = root / split / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = sizes[number % len(sizes)], sizes[(number // 2) % len(sizes)]
        smooth_image(number, width, height).save(folder / f"{number:04d}.jpg", quality=90)
    return root / split


def make_folder(root: Path, train: int = 24, val: int = 13) -> Path:
    make_split(root, "train", train)
    make_split(root, "val", val)
    return root


def make_betons(folder: Path, out: Path, **settings) -> Path:
    for split in ("train", "val"):
        write_beton(list_folder(folder / split), out / f"{split}.beton", WriteSettings(**settings), num_workers=1)
    return out
