"""The native decoder against Pillow: the same bytes, whatever the threads and the image."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.augment import AugmentPlan, Operation
from data.ffcv_ops import Failure
from data.keyed_random import sample_key
from data.native_decoder import KeyedDecoder
from data.native_library import NativeUnavailable, load_library
from data.pixels import EvalPlan, augmented, center_cropped
from mambavision.config import AugmentConfig
from tests.unit.data_samples import OPERATIONS, photograph

GOLDEN = Path(__file__).parents[1] / "golden"
JPG, RAW = 0, 1
MEAN = (0.485, 0.456, 0.406)
PLAIN = AugmentConfig(auto_augment="none")

try:
    LIBRARY = load_library()
except NativeUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def decoder(config: AugmentConfig = PLAIN, *, size: int = 96, seed: int = 7) -> KeyedDecoder:
    plan = AugmentPlan.create(config, image_size=size, seed=seed, mean=MEAN)
    return KeyedDecoder(plan, num_samples=1000, corrupt="stop")


def decode(
    decoder: KeyedDecoder, data: bytes, *, sample: int = 0, mode: int = JPG, size: tuple[int, int] | None = None
):
    width, height = size or Image.open(io.BytesIO(data)).size
    return decoder.decode(data, mode=mode, width=width, height=height, sample=sample)


@pytest.mark.parametrize(
    "options", [dict(subsampling=0), dict(subsampling=1), dict(subsampling=2), dict(progressive=True)], ids=str
)
def test_a_crop_decodes_to_the_pixels_of_the_whole_image(options):
    image = photograph(333, 257)
    data = jpeg(image, **options)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    ours = decoder()
    for sample in range(30):
        expected = augmented(whole, sample_key(7, 0, sample), ours_plan(PLAIN))
        assert_nearly_equal(decode(ours, data, sample=sample), expected)


def test_a_crop_of_a_4_1_0_image_has_its_colours():
    """At 1/2 and 1/4 libjpeg decodes colours at another scale than brightness there, and forgets it when it leaves out columns."""
    data = (GOLDEN / "sampling_410.jpg").read_bytes()
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    ours = decoder(size=48)
    for sample in range(60):
        expected = augmented(whole, sample_key(7, 0, sample), ours_plan(PLAIN, 48))
        assert_nearly_equal(decode(ours, data, sample=sample), expected)


def ours_plan(config: AugmentConfig, size: int = 96, seed: int = 7) -> AugmentPlan:
    return AugmentPlan.create(config, image_size=size, seed=seed, mean=MEAN)


def assert_nearly_equal(ours: np.ndarray, pillows: np.ndarray) -> None:
    """Pillow brings its own libjpeg and chooses its own order of passes: versions differ by rounding."""
    difference = np.abs(ours.astype(int) - pillows)
    assert difference.mean() < 0.5 and np.percentile(difference, 99) <= 3


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(auto_augment="rand-m9-n4-p1-mstd0.5-inc0", interpolation="bicubic"),
        AugmentConfig(auto_augment="rand-m5-mstd101-mmax12-inc1", interpolation="bilinear"),
        AugmentConfig(auto_augment="trivial"),
        AugmentConfig(auto_augment="three", color_jitter=0.3),
        AugmentConfig(auto_augment="none", color_jitter=0.4),
        AugmentConfig(auto_augment="none", random_crop=False, pad_crop=4),
    ],
    ids=lambda config: f"{config.auto_augment}-{config.color_jitter}-{config.random_crop}",
)
def test_draws_are_those_of_the_reference(config):
    plan, ours = ours_plan(config), decoder(config)
    choices, operations = np.empty(9, np.int64), np.empty((32, 3))
    for epoch in (0, 3):
        ours.set_epoch(epoch)
        for sample in range(400):
            height, width = 40 + sample % 301, 30 + sample % 457
            key = sample_key(7, epoch, sample)
            LIBRARY.loader_draw(
                ours.settings_address, sample, height, width, choices.ctypes.data, operations.ctypes.data
            )
            assert tuple(choices[:4]) == plan.box(key, height, width)
            assert choices[4] == plan.interpolation(key)
            assert bool(choices[5]) == plan.flips(key)
            if config.pad_crop:
                assert tuple(choices[6:8]) == plan.pad_offset(key)
            drawn = [Operation(OPERATIONS[int(n)], a, int(r)) for n, a, r in operations[: choices[8]]]
            assert drawn == plan.operations(key)


@pytest.mark.parametrize("crop_mode, crop_pct", [("center", 1.0), ("center", 0.875), ("squash", 0.95)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_is_resize_and_center_crop(crop_mode, crop_pct, interpolation):
    plan = EvalPlan(96, crop_pct, crop_mode, interpolation)
    ours = KeyedDecoder(plan, num_samples=1)
    for height, width in ((333, 257), (120, 500), (97, 96), (40, 60), (96, 96)):
        data = jpeg(photograph(height, width))
        expected = center_cropped(Image.open(io.BytesIO(data)).convert("RGB"), plan)
        assert_nearly_equal(decode(ours, data), expected)


def test_raw_and_jpeg_samples_take_the_same_path():
    image = Image.open(io.BytesIO(jpeg(photograph(200, 300)))).convert("RGB")
    ours = decoder(AugmentConfig(), size=64)
    for sample in range(20):
        out = decode(ours, image.tobytes(), mode=RAW, size=image.size, sample=sample)
        assert_nearly_equal(out, augmented(image, sample_key(7, 0, sample), ours_plan(AugmentConfig(), 64)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_become_rgb_as_in_pillow(mode):
    data = jpeg(photograph(150, 170).convert(mode))
    expected = augmented(Image.open(io.BytesIO(data)).convert("RGB"), sample_key(7, 0, 3), ours_plan(PLAIN))
    assert_nearly_equal(decode(decoder(), data, sample=3), expected)


def test_far_too_large_images_are_shrunk_while_they_are_decoded():
    image = photograph(900, 1200).resize((1200, 900))
    data = jpeg(image)
    config = replace(PLAIN, random_crop=False, hflip=0.0, interpolation="bicubic")
    expected = augmented(Image.open(io.BytesIO(data)).convert("RGB"), sample_key(7, 0, 0), ours_plan(config, 48))
    difference = np.abs(decode(decoder(config, size=48), data).astype(int) - expected)
    assert 0 < difference.mean() < 3.0


@pytest.mark.parametrize("height, width", [(1, 1), (1, 400), (400, 1), (2, 3), (9, 5000)])
def test_odd_sizes(height, width):
    data = jpeg(photograph(max(height, 4), max(width, 4)).crop((0, 0, width, height)))
    ours = decoder(size=32)
    for sample in range(10):
        expected = augmented(
            Image.open(io.BytesIO(data)).convert("RGB"), sample_key(7, 0, sample), ours_plan(PLAIN, 32)
        )
        assert_nearly_equal(decode(ours, data, sample=sample), expected)


@pytest.mark.parametrize(
    "damage, size",
    [
        (lambda data: data[: len(data) // 3], None),
        (lambda data: data[:600] + bytes(len(data) - 600), None),
        (lambda data: b"", (300, 200)),
        (lambda data: b"GIF89a" + data[6:], (300, 200)),
        (lambda data: data[: len(data) // 2] + bytes(2000) + data[len(data) // 2 + 2000 :], None),
        (lambda data: data, (301, 200)),
    ],
    ids=["truncated", "no_header", "empty", "not_jpeg", "zeroed", "other_size"],
)
def test_damage_is_noticed(damage, size):
    whole = jpeg(photograph(200, 300))
    config = replace(PLAIN, random_crop=False)
    assert decode(decoder(config), damage(whole), size=size or (300, 200)) is None


def test_nothing_is_cut_off_when_bytes_follow_the_image():
    data = jpeg(photograph(64, 64))
    assert decode(decoder(), data + b"\0" * 100) is not None


def test_decoding_while_other_threads_decode_gives_the_same_bytes():
    from concurrent.futures import ThreadPoolExecutor

    data = [jpeg(photograph(150 + 7 * i, 190, i)) for i in range(8)]
    ours = decoder(AugmentConfig())
    alone = [decode(ours, data[i % 8], sample=i) for i in range(64)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda i: decode(ours, data[i % 8], sample=i), range(64)))
    assert all((a == b).all() for a, b in zip(alone, together))


def test_skip_needs_the_file():
    with pytest.raises(ValueError, match="path"):
        KeyedDecoder(ours_plan(PLAIN), num_samples=3)


def test_failures_of_one_decoder_are_not_anothers():
    first, second = decoder(), decoder()
    address = np.zeros(4, np.uint8)
    out = np.full((96, 96, 3), 9, np.uint8)
    LIBRARY.loader_decode(first.settings_address, address.ctypes.data, 4, JPG, 9, 9, 5, out.ctypes.data, 0)
    assert (out == 0).all(), "an unreadable image leaves no old pixels"
    assert second.take_failures() == []
    assert first.take_failures() == [Failure(5, -1, "not a JPEG that can be decoded")]
    assert first.take_failures() == []
