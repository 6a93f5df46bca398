"""Resizing and the augmentations' operations in native code against Pillow: the same to the bit, on any instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data.augment import Operation
from data.native_library import NativeUnavailable, load_library
from data.pixels import apply
from tests.unit.data_samples import MOVED, OPERATIONS, photograph

FILL = (124, 116, 104)

try:
    LIBRARY = load_library()
except NativeUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture(params=range(LIBRARY.loader_use_isa(-1) + 1), ids=["generic", "avx2"].__getitem__)
def isa(request):
    assert LIBRARY.loader_use_isa(request.param) == request.param
    yield request.param
    LIBRARY.loader_use_isa(-1)


@pytest.mark.parametrize("filter_", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resize_is_pillows_to_the_bit(isa, filter_):
    rng = np.random.default_rng(1)
    image = photograph(211, 307)
    pixels = np.asarray(image)
    for size in (7, 32, 64, 65, 96, 224):
        for _ in range(6):
            height, width = int(rng.integers(1, 212)), int(rng.integers(1, 308))
            top, left = int(rng.integers(0, 212 - height)), int(rng.integers(0, 308 - width))
            flip = int(rng.integers(2))
            out = np.full((size + 1, size, 3), 77, np.uint8)
            status = LIBRARY.loader_resize(
                pixels.ctypes.data, 211, 307, top, left, height, width, size, _filter(filter_), flip, out.ctypes.data
            )
            expected = np.asarray(
                _resized_horizontally_first_or_as_pillow(image, (top, left, height, width), size, filter_)
            )
            assert status == 0
            np.testing.assert_array_equal(out[:size], expected[:, ::-1] if flip else expected)
            assert (out[size] == 77).all(), "wrote beyond the image"


def _filter(resampling: Image.Resampling) -> int:
    return {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2}[resampling]


def _resized_horizontally_first_or_as_pillow(image, box, size, filter_):
    """What Pillow 13 does; earlier versions always begin with the rows, later ones with what is cheaper."""
    top, left, height, width = box
    part = image.crop((left, top, left + width, top + height))
    if height > size and height - size > 2 * (width - size):
        return part.resize((width, size), filter_).resize((size, size), filter_)
    return part.resize((size, height), filter_).resize((size, size), filter_)


ARGUMENTS = {
    "rotate": (-30.0, -7.3, 0.0, 12.6, 90.0, 121.5, 270.0),
    "posterize": (0, 1, 4, 8),
    "solarize": (0, 26, 127.5, 256),
    "solarize_add": (0, 99, 128),
    "color": (0.0, 0.19, 1.0, 1.81),
    "contrast": (0.1, 0.19, 1.81),
    "brightness": (0.1, 0.19, 1.81),
    "sharpness": (0.1, 0.19, 1.81),
    "shear_x": (-0.3, 0.27, 0.99),
    "shear_y": (-0.27, 0.3),
    "translate_x": (-40.32, 13.0, 0.0),
    "translate_y": (-13.0, 40.32),
    "gaussian_blur": (0.1, 0.7, 1.3, 2.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows_to_the_bit(name):
    for seed, size in ((0, 96), (1, 61)):
        image = photograph(size, size, seed)
        dull = Image.fromarray((np.asarray(image) // 3 + 40).astype(np.uint8))
        flat = Image.new("RGB", (size, size), (90, 90, 200))
        affine = name in ("rotate", *MOVED)
        for source in (image, dull, flat):
            for argument in ARGUMENTS.get(name, (0.0,)):
                for filter_ in (0, 1, 2) if affine else (0,):
                    ours = np.array(source)
                    fill = np.array(FILL, np.uint8)
                    LIBRARY.loader_apply(
                        ours.ctypes.data, size, OPERATIONS.index(name), float(argument), filter_, fill.ctypes.data
                    )
                    expected = np.asarray(apply(source, Operation(name, argument, filter_), FILL))
                    np.testing.assert_array_equal(ours, expected, f"{name}({argument}), filter {filter_}")


def test_random_affine_transforms_are_pillows_to_the_bit():
    rng = np.random.default_rng(0)
    fill = np.array(FILL, np.uint8)
    # The centre of an odd image turns into itself: a matrix that is off in its last digit shows there.
    cases = [("rotate", 143.49177175199543, 1, 137), ("rotate", 179.04601634485687, 1, 67)]
    for _ in range(150):
        name, size = ("rotate", *MOVED)[rng.integers(5)], int(rng.integers(1, 120))
        most = {"rotate": 180.0, "shear_x": 1.0, "shear_y": 1.0}.get(name, size)
        cases.append((name, float(rng.uniform(-most, most)), int(rng.integers(3)), size))
    for name, argument, filter_, size in cases:
        source = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        ours = np.array(source)
        index = OPERATIONS.index(name)
        LIBRARY.loader_apply(ours.ctypes.data, size, index, argument, filter_, fill.ctypes.data)
        expected = np.asarray(apply(source, Operation(name, argument, filter_), FILL))
        np.testing.assert_array_equal(ours, expected, f"{name}({argument}), filter {filter_}, {size} px")
