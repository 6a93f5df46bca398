"""The native decoder in FFCV's Loader: the same bytes for any thread count and cache, substitutes, no compilation."""

from __future__ import annotations

import gc
import io
import multiprocessing

import numpy as np
import pytest

from data.augment import AugmentPlan
from data.beton import JPG, RAW, BetonWriter, EncodedImage
from data.native_library import NativeUnavailable, load_library
from mambavision.config import AugmentConfig
from tests.unit.data_samples import smooth_image

try:
    load_library()
except NativeUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

from ffcv.loader import Loader
from ffcv.pipeline.compiler import Compiler

from data.ffcv_ops import GivenOrder, image_pipeline
from data.native_decoder import KeyedDecoder

COUNT, SIZE, SEED = 40, 48, 3
BROKEN = (7, 8, 39)


def stored(number: int) -> EncodedImage:
    image = smooth_image(number, 60 + number, 90 - number)
    if number % 5 == 4:
        return EncodedImage(RAW, image.width, image.height, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    return EncodedImage(JPG, image.width, image.height, data)


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    """(whole, broken): in the second the images of BROKEN lost their ends."""
    directory = tmp_path_factory.mktemp("betons")
    for name, broken in (("whole", ()), ("broken", BROKEN)):
        writer = BetonWriter(directory / f"{name}.beton", max_samples=COUNT)
        for number in range(COUNT):
            image = stored(number)
            if number in broken:
                image = image._replace(mode=JPG, data=image.data[: len(image.data) // 4])
            writer.add(image, number)
        writer.complete()
        writer.publish()
    return directory / "whole.beton", directory / "broken.beton"


def plan() -> AugmentPlan:
    return AugmentPlan.create(AugmentConfig(), image_size=SIZE, seed=SEED, mean=(0.5, 0.5, 0.5))


def epoch(path, decoder: KeyedDecoder, *, workers: int, order: np.ndarray, os_cache: bool = True) -> np.ndarray:
    loader = Loader(
        str(path),
        batch_size=16,
        num_workers=workers,
        os_cache=os_cache,
        order=GivenOrder(order),
        drop_last=False,
        seed=0,
        pipelines=image_pipeline(decoder),
    )
    return np.concatenate([images.copy() for (images,) in loader])


def alone(decoder: KeyedDecoder, number: int, key_of: int) -> np.ndarray:
    image = stored(number)
    return decoder.decode(image.data, mode=image.mode, width=image.width, height=image.height, sample=key_of)


def test_the_same_bytes_for_any_number_of_threads_and_either_cache(betons):
    decoder = KeyedDecoder(plan(), num_samples=COUNT, path=betons[0])
    decoder.set_epoch(2)
    order = np.random.default_rng(0).permutation(COUNT).astype(np.uint64)
    expected = np.stack([alone(decoder, int(number), int(number)) for number in order])
    for workers in (1, 2, 3):
        decoder = KeyedDecoder(plan(), num_samples=COUNT, path=betons[0], num_threads=workers)
        decoder.set_epoch(2)
        for os_cache in (True, False):
            images = epoch(betons[0], decoder, workers=1, order=order, os_cache=os_cache)
            np.testing.assert_array_equal(images, expected)
    decoder.set_epoch(3)
    assert (epoch(betons[0], decoder, workers=2, order=order) != expected).any()
    assert decoder.take_failures() == []


@pytest.mark.parametrize("os_cache", [True, False])
def test_unreadable_images_are_replaced_by_the_next_readable_one(betons, os_cache):
    decoder = KeyedDecoder(plan(), num_samples=COUNT, path=betons[1])
    order = np.arange(COUNT, dtype=np.uint64)
    images = epoch(betons[1], decoder, workers=2, order=order, os_cache=os_cache)
    failures = sorted(decoder.take_failures())
    replacements = {7: 9, 8: 9, 39: 0}
    assert [(failure.sample, failure.replacement) for failure in failures] == sorted(replacements.items())
    assert all("JPEG" in failure.reason for failure in failures)
    for number in range(COUNT):
        np.testing.assert_array_equal(images[number], alone(decoder, replacements.get(number, number), number))


def test_stop_leaves_zeros_and_says_so(betons):
    decoder = KeyedDecoder(plan(), num_samples=COUNT, corrupt="stop")
    images = epoch(betons[1], decoder, workers=2, order=np.arange(COUNT, dtype=np.uint64))
    assert sorted(failure[:2] for failure in decoder.take_failures()) == [(number, -1) for number in BROKEN]
    assert [number for number in range(COUNT) if not images[number].any()] == list(BROKEN)


def test_a_loader_starts_without_compiling(betons, monkeypatch):
    def compiled(*arguments, **options):
        raise AssertionError("numba was asked to compile")

    monkeypatch.setattr("ffcv.pipeline.compiler.njit", compiled)
    monkeypatch.setattr(Compiler, "num_threads", 2)
    decoder = KeyedDecoder(plan(), num_samples=COUNT, path=betons[0])
    monkeypatch.setattr("ffcv.memory_managers.os_cache.OSCacheManager.compile_reader", lambda manager: None)
    assert len(epoch(betons[0], decoder, workers=2, order=np.arange(COUNT, dtype=np.uint64))) == COUNT


def test_a_forked_process_drops_a_decoder_that_it_inherited(betons):
    """Workers of a folder loader hung: they waited for decoder threads that exist in their parent alone."""
    decoder = KeyedDecoder(plan(), num_samples=COUNT, path=betons[0], num_threads=3)
    expected = epoch(betons[0], decoder, workers=2, order=np.arange(COUNT, dtype=np.uint64))

    def child() -> None:
        nonlocal decoder
        del decoder
        gc.collect()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    process.kill()  # one that hangs
    assert process.exitcode == 0
    np.testing.assert_array_equal(
        epoch(betons[0], decoder, workers=2, order=np.arange(COUNT, dtype=np.uint64)), expected
    )
