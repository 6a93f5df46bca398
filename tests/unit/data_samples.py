"""Images, small image folders and .beton files for the data tests, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.conversion import WriteSettings, write_beton
from data.datasets import list_folder

# In the order of OperationName in data/native/augment.h.
POINTWISE = ("identity", "autocontrast", "equalize", "invert"), ("posterize", "solarize", "solarize_add")
BLENDED = ("color", "contrast", "brightness", "sharpness")
MOVED = ("shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*POINTWISE[0], "rotate", *POINTWISE[1], *BLENDED, *MOVED, "gaussian_blur")


def smooth_image(number: int, width: int, height: int) -> Image.Image:
    """A picture of soft colour blobs, different for each number: what a JPEG keeps nearly as it is."""
    cells = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with noise and hard edges: something of everything that a resize can get wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [128 + 90 * np.sin(x / rng.uniform(3, 40) + c) * np.cos(y / rng.uniform(3, 40)) for c in range(3)]
    pixels = np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


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
