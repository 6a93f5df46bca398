"""FFCV's decoder operation over data/native/: crop decoding, exact resize and keyed augmentation in one call per image.

This file fills the decoder's settings from a plan and connects it to FFCV; what is drawn is data.augment's business,
the C++ repeats it. The settings are read when an image is decoded, so a new epoch compiles nothing.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
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
}
MAX_LAYERS = 32  # RandAugment layers that the decoder has room for
POLICIES = {None: 0, "trivial": 2, "three": 3}


class KeyedDecoder(Operation):
    """The first and only operation of an image pipeline. Output: (B, S, S, 3) uint8, S the plan's image size.

    `path`, the .beton itself, is needed with corrupt="skip": substitutes are read from it. Raises NativeUnavailable
    where the library cannot be built, ValueError for a plan or a combination that it cannot run.
    """

    def __init__(
        self,
        plan: AugmentPlan | EvalPlan,
        *,
        num_samples: int,
        corrupt: str = "skip",
        path: str | Path | None = None,
    ):
        super().__init__()
        self._library = load_library()
        self._settings = Settings(num_samples=num_samples, failures=self._library.loader_new_log())
        fill_settings(self._settings, plan)
        if corrupt == "skip" and isinstance(plan, AugmentPlan):
            if path is None:
                raise ValueError("KeyedDecoder(corrupt='skip') needs path=..., the .beton it takes substitutes from")
            self._file = np.memmap(path, dtype=np.uint8, mode="r")
            self._settings.file, self._settings.file_size = self._file.ctypes.data, self._file.size
            self._settings.substitute = 1

    def __del__(self) -> None:
        if settings := getattr(self, "_settings", None):
            self._library.loader_delete_log(settings.failures)

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

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        assert self.metadata.dtype.names == ("mode", "width", "height", "data_ptr")
        self._settings.metadata = self.metadata.ctypes.data
        self._settings.metadata_stride = self.metadata.strides[0]
        size = self._settings.image_size
        shape = (size, size, 3)
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1"))
        return state, (AllocationQuery(shape, np.dtype("u1")), AllocationQuery((1,), np.dtype("i8")))

    def generate_code(self) -> Callable:
        read, threads = self.memory_read, Compiler.get_iterator()
        decode_image, take_next = self._library.loader_decode, self._library.loader_next
        settings, num_samples = self.settings_address, self._settings.num_samples
        num_threads = Compiler.num_threads

        def decode(batch_indices, memory, metadata, storage_state):
            destination, counter = memory
            # Threads take images one by one, as they differ in cost: shares fixed beforehand would end apart.
            counter[0, 0] = 0
            batch = destination.ctypes.data
            for _ in threads(num_threads):
                i = take_next(counter.ctypes.data)
                while i < len(batch_indices):
                    sample = np.int64(batch_indices[i])
                    field = metadata[sample % num_samples]
                    data = read(field["data_ptr"], storage_state)
                    mode, width, height = field["mode"], field["width"], field["height"]
                    decode_image(settings, data.ctypes.data, data.size, mode, width, height, sample, batch, i)
                    i = take_next(counter.ctypes.data)
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


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
