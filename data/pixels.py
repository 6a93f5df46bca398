"""Image in, uint8 square out, with Pillow: decoding, crop and resize, flip, the augmentation operations.

The reference for the native decoder, and what the folder loader runs. All choices come from data.augment.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from data.augment import BICUBIC, BILINEAR, NEAREST, AugmentPlan, Operation
from data.jpeg_check import jpeg_damage
from mambavision.config import DataConfig

RESAMPLE = {
    NEAREST: Image.Resampling.NEAREST,
    BILINEAR: Image.Resampling.BILINEAR,
    BICUBIC: Image.Resampling.BICUBIC,
}
# What Pillow raises; the last one for damaged AVIF.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, RuntimeError)


class NotWhole(ValueError):
    """Bytes that are no image, or a damaged one."""


def why_unreadable(error: BaseException) -> str:
    """One of UNREADABLE in words, the same in every process."""
    return str(error) if isinstance(error, NotWhole) else f"{type(error).__name__}: {error}"


def read_image(source: str | bytes) -> Image.Image:
    """An RGB image from a path or from encoded bytes. Raises one of UNREADABLE.

    As in torchvision and timm an EXIF orientation is ignored and transparency dropped; 16-bit images are scaled to 8.
    """
    with opened(source) if isinstance(source, bytes) else Image.open(source) as image:
        return _to_rgb(image)


def read_whole(content: bytes) -> tuple[Image.Image, bool]:
    """`read_image` that refuses JPEGs with damage inside, and whether the bytes are a JPEG that every decoder reads.

    Raises one of UNREADABLE. Without the native library (data.jpeg_check) damage passes, as it does with Pillow alone.
    """
    if damage := jpeg_damage(content):
        raise NotWhole(damage)
    with opened(content) as image:
        return _to_rgb(image), image.format == "JPEG" and image.mode in ("L", "RGB")


def opened(content: bytes) -> Image.Image:
    """Image.open, whose own message for bytes of no known format is the address of a buffer."""
    if not content:
        raise NotWhole("the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise NotWhole(f"not an image of a known format: it begins with {content[:16]!r}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
        grey = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    return image.convert("RGB")


def augmented(image: Image.Image, key: int, plan: AugmentPlan) -> np.ndarray:
    """A training sample, (image_size, image_size, 3) uint8."""
    box = plan.box(key, image.height, image.width)
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    image = image.crop(edges).resize((plan.image_size, plan.image_size), RESAMPLE[plan.interpolation(key)])
    return np.asarray(finished(image, key, plan))


def finished(image: Image.Image, key: int, plan: AugmentPlan) -> Image.Image:
    """All that comes after crop and resize, on an image of the final size."""
    if plan.config.pad_crop and not plan.config.random_crop:
        image = ImageOps.expand(image, plan.config.pad_crop)
        top, left = plan.pad_offset(key)
        image = image.crop((left, top, left + plan.image_size, top + plan.image_size))
    if plan.flips(key):
        image = ImageOps.mirror(image)
    fill = plan.fill if plan.policy != "trivial" else (0, 0, 0)
    for operation in plan.operations(key):
        image = apply(image, operation, fill)
    return image


def apply(image: Image.Image, operation: Operation, fill: tuple[int, int, int]) -> Image.Image:
    return OPERATIONS[operation.name](image, operation.argument, {"resample": RESAMPLE[operation.resample]}, fill)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: dict, fill: tuple[int, int, int]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill, **resample)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """ImageOps.posterize, which refuses 0 bits: what RandAugment asks for at full magnitude, a black image."""
    return image.point([i & (0xFF00 >> bits) & 0xFF for i in range(256)] * 3)


def _solarize_add(image: Image.Image, addend: float) -> Image.Image:
    return image.point([min(255, i + int(addend)) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: dict[str, Callable[[Image.Image, float, dict, tuple[int, int, int]], Image.Image]] = {
    "identity": lambda image, _, __, ___: image,
    "autocontrast": lambda image, _, __, ___: ImageOps.autocontrast(image),
    "equalize": lambda image, _, __, ___: ImageOps.equalize(image),
    "invert": lambda image, _, __, ___: ImageOps.invert(image),
    "posterize": lambda image, bits, _, __: _posterize(image, int(bits)),
    "solarize": lambda image, threshold, _, __: ImageOps.solarize(image, threshold),
    "solarize_add": lambda image, addend, _, __: _solarize_add(image, addend),
    "color": lambda image, factor, _, __: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor, _, __: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor, _, __: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor, _, __: ImageEnhance.Sharpness(image).enhance(factor),
    "gaussian_blur": lambda image, radius, _, __: image.filter(ImageFilter.GaussianBlur(radius)),
    "rotate": lambda image, degrees, resample, fill: image.rotate(degrees, fillcolor=fill, **resample),
    "shear_x": lambda image, x, resample, fill: _affine(image, (1, x, 0, 0, 1, 0), resample, fill),
    "shear_y": lambda image, y, resample, fill: _affine(image, (1, 0, 0, y, 1, 0), resample, fill),
    "translate_x": lambda image, x, resample, fill: _affine(image, (1, 0, x, 0, 1, 0), resample, fill),
    "translate_y": lambda image, y, resample, fill: _affine(image, (1, 0, 0, 0, 1, y), resample, fill),
}


@dataclass(frozen=True)
class EvalPlan:
    """How an evaluation image is resized and cropped, as in timm: torchvision's Resize, then CenterCrop."""

    image_size: int
    crop_pct: float
    crop_mode: str  # center | squash
    interpolation: str  # bilinear | bicubic

    @classmethod
    def create(cls, data: DataConfig) -> EvalPlan:
        return cls(data.image_size, data.crop_pct, data.crop_mode, data.eval_interpolation)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize."""
        side = math.floor(self.image_size / self.crop_pct)
        if self.crop_mode == "squash":
            return side, side
        if width <= height:
            return int(side * height / width), side
        return side, int(side * width / height)

    def offset(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the crop in the resized image, which is never smaller than the crop."""
        return round((height - self.image_size) / 2.0), round((width - self.image_size) / 2.0)


def center_cropped(image: Image.Image, plan: EvalPlan) -> np.ndarray:
    """An evaluation sample, (image_size, image_size, 3) uint8."""
    height, width = plan.resized(image.height, image.width)
    filter_ = Image.Resampling.BICUBIC if plan.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if (width, height) != image.size:
        image = image.resize((width, height), filter_)
    top, left = plan.offset(height, width)
    return np.asarray(image.crop((left, top, left + plan.image_size, top + plan.image_size)))
