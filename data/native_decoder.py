"""FFCV's decoder operation over data/native/: crop decoding, exact resize and keyed augmentation, one call per batch.

This file fills the decoder's settings from a plan and connects it to FFCV; what is drawn is data.augment's business,
the C++ repeats it. Nothing is compiled when a loader starts: FFCV's operations are made of numba code, which costs
seconds in every process; ours is in a library that is there already.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from ffcv.memory_managers.os_cache import OSCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from data.augment import BICUBIC, BILINEAR, AugmentPlan, RandAugment
from data.ffcv_ops import Failure
from data.native_library import Settings, load_library
from data.pixels import EvalPlan

REASONS = {
    1: "not a JPEG that can be decoded",
    2: "damaged: JPEG data missing or invalid",
    3: "its size is not what the data set says",
    4: "not enough memory to decode it",
}
MAX_LAYERS = 32  # RandAugment layers that the decoder has room for
POLICIES = {None: 0, "trivial": 2, "three": 3}


def uncompiled(code: Callable) -> Callable:
    """Mark an operation's code as to be run as it is, by Python."""

    def run(*arguments):
        return code(*arguments)

    run.is_uncompiled = True
    return run


def _compile(cls: type[Compiler], code: Callable, signature: object = None) -> Callable:
    return code if getattr(code, "is_uncompiled", False) else _numba_compile(code, signature)


def _compile_reader_when_used(manager: OSCacheManager) -> Callable:
    """FFCV's look-up of stored bytes, compiled for no signature: numba then waits for a first call."""

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return Compiler.compile(read)


_numba_compile = Compiler.compile
Compiler.compile = classmethod(_compile)
OSCacheManager.compile_reader = _compile_reader_when_used


class KeyedDecoder(Operation):
    """The first and only operation of an image pipeline. Output: (B, S, S, 3) uint8, S the plan's image size.

    `path`, the .beton itself, is needed with corrupt="skip": substitutes are read from it.
    `num_threads`: None takes the Loader's num_workers, which numba limits to the cores. Raises NativeUnavailable where
    the library cannot be built, ValueError for a plan or a combination that it cannot run.
    """

    def __init__(
        self,
        plan: AugmentPlan | EvalPlan,
        *,
        num_samples: int,
        corrupt: str = "skip",
        path: str | Path | None = None,
        num_threads: int | None = None,
    ):
        super().__init__()
        self._library = load_library()
        self._process = os.getpid()
        self._settings = Settings(num_samples=num_samples, failures=self._library.loader_new_log())
        self._num_threads = num_threads
        self._pool: int | None = None
        fill_settings(self._settings, plan)
        if corrupt == "skip" and isinstance(plan, AugmentPlan):
            if path is None:
                raise ValueError("KeyedDecoder(corrupt='skip') needs path=..., the .beton it takes substitutes from")
            self._file = np.memmap(path, dtype=np.uint8, mode="r")
            self._settings.file, self._settings.file_size = self._file.ctypes.data, self._file.size
            self._settings.substitute = 1

    def __del__(self) -> None:
        # In a forked process (another loader's worker) the decoder's threads are missing: joining them would never end.
        if (settings := getattr(self, "_settings", None)) and self._process == os.getpid():
            self._library.loader_delete_log(settings.failures)
            if self._pool is not None:
                self._library.loader_delete_pool(self._pool)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose keys are drawn from now on."""
        self._settings.epoch = epoch

    @property
    def settings_address(self) -> int:
        """Where the settings lie: what the library's functions take, and a constant in generated code."""
        return ctypes.addressof(self._settings)

    def take_failures(self) -> list[Failure]:
        """Samples that could not be read since the last call, each noted before its batch is handed out."""
        failures: list[Failure] = []
        room = np.empty((64, 3), dtype=np.int64)
        while count := self._library.loader_take_failures(self._settings.failures, room.ctypes.data, len(room)):
            failures += [Failure(int(s), int(r), REASONS[int(status)]) for s, r, status in room[:count]]
        return failures

    def decode(self, data: bytes, *, mode: int, width: int, height: int, sample: int) -> np.ndarray | None:
        """One stored image outside of any pipeline: (S, S, 3) uint8, or None if it cannot be read. Nothing is noted."""
        settings = Settings.from_buffer_copy(self._settings)
        settings.failures, settings.substitute = None, 0
        out = np.empty((settings.image_size, settings.image_size, 3), dtype=np.uint8)
        source = ctypes.create_string_buffer(data, len(data))
        status = self._library.loader_decode(
            ctypes.addressof(settings),
            ctypes.addressof(source),
            len(data),
            mode,
            width,
            height,
            sample,
            out.ctypes.data,
            0,
        )
        return None if status else out

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        assert self.metadata.dtype.names == ("mode", "width", "height", "data_ptr")
        self._settings.metadata = self.metadata.ctypes.data
        self._settings.metadata_stride = self.metadata.strides[0]
        size = self._settings.image_size
        state = replace(previous_state, jit_mode=True, shape=(size, size, 3), dtype=np.dtype("u1"))
        return state, AllocationQuery((size, size, 3), np.dtype("u1"))

    def generate_code(self) -> Callable:
        if self._pool is None:
            self._pool = self._library.loader_new_pool(self._num_threads or Compiler.num_threads)
        return uncompiled(self._decode_batch)

    def _decode_batch(
        self, samples: np.ndarray, batch: np.ndarray, metadata: np.ndarray, storage_state: tuple
    ) -> np.ndarray:
        """Find all images in FFCV's memory, then decode them in one call, which uses threads and no GIL."""
        images = metadata[samples % np.uint64(self._settings.num_samples)]
        samples = samples.astype(np.int64)
        stored = np.empty((len(images), 5), dtype=np.int64)
        stored[:, 0], stored[:, 1] = locate(images["data_ptr"], storage_state)
        stored[:, 2], stored[:, 3], stored[:, 4] = images["mode"], images["width"], images["height"]
        self._library.loader_decode_batch(
            self.settings_address, self._pool, len(samples), samples.ctypes.data, stored.ctypes.data, batch.ctypes.data
        )
        return batch[: len(samples)]


def locate(pointers: np.ndarray, storage_state: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and sizes of stored values: what FFCV's memory managers do for one value, for an array of them."""
    memory, starts, sizes = storage_state[:3]
    size = sizes[np.searchsorted(starts, pointers)]
    base = np.uint64(memory.ctypes.data)
    if len(storage_state) == 3:  # os_cache=True: the file is mapped
        return base + pointers, size
    page_size = np.uint64(memory.shape[1])  # os_cache=False: its pages are read into slots
    slots = storage_state[3][pointers // page_size].astype(np.uint64)
    return base + slots * page_size + pointers % page_size, size


def fill_settings(settings: Settings, plan: AugmentPlan | EvalPlan) -> None:
    """Write a plan into the decoder's settings; epoch, failure log and file are left as they are."""
    settings.image_size = plan.image_size
    settings.evaluate = isinstance(plan, EvalPlan)
    if isinstance(plan, EvalPlan):
        if not 0.0 < plan.crop_pct <= 1.0:
            raise ValueError(f"data.crop_pct={plan.crop_pct} has to be in (0, 1]")
        settings.filter = {"bilinear": BILINEAR, "bicubic": BICUBIC}[plan.interpolation]
        settings.resized_side = math.floor(plan.image_size / plan.crop_pct)
        settings.squash = plan.crop_mode == "squash"
        return
    config, policy = plan.config, plan.policy
    settings.seed = ctypes.c_int64(plan.seed).value
    settings.filter = {"random": 0, "bilinear": BILINEAR, "bicubic": BICUBIC}[config.interpolation]
    settings.random_crop, settings.pad_crop = config.random_crop, config.pad_crop
    settings.scale, settings.ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
    settings.hflip, settings.jitter, settings.fill = config.hflip, plan.jitter, tuple(plan.fill)
    if isinstance(policy, RandAugment):
        if policy.num_layers > MAX_LAYERS:
            raise ValueError(
                f"augment.auto_augment asks for {policy.num_layers} layers, at most {MAX_LAYERS} are possible"
            )
        settings.policy, settings.layers, settings.increasing = 1, policy.num_layers, policy.increasing
        settings.prob, settings.magnitude = policy.prob, policy.magnitude
        settings.magnitude_std, settings.magnitude_max = policy.magnitude_std, policy.magnitude_max
    else:
        settings.policy = POLICIES[policy]
