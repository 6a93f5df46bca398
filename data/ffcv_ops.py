"""FFCV's part of the loader: its pipelines for the image field, its order, and an iterator that cannot hang.

What is asked of `data.native_decoder` (which needs a C++ compiler at first use):

    KeyedDecoder(plan, *, num_samples, corrupt="skip" | "stop", path)   an ffcv Operation, decoder of an image pipeline
        and all of it. `plan` is an AugmentPlan (training) or an EvalPlan (evaluation). Output: (B, S, S, 3) uint8.
        Raises data.native_library.NativeUnavailable (a RuntimeError naming the reason) where it cannot be built.
    .set_epoch(epoch)            keys of the samples decoded from now on; training plans only
    .take_failures() -> list[Failure]
        samples whose image could not be read since the last call, each complete before its batch is handed out.
        skip: (sample + 1) % num_samples, then + 2, ... was decoded in its place with the key of `sample`;
        in evaluation, and with stop, nothing was: `replacement` is -1 and the output is zero.

Sample numbers at or above num_samples are repetitions (data.order): the image is sample % num_samples, the key the
whole number.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import NamedTuple

import ffcv.loader.loader
import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator
from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.reader import Reader
from ffcv.traversal_order.base import TraversalOrder
from PIL import Image

from data import keyed_random
from data.augment import AugmentPlan
from data.pixels import finished
from data.stall import StallWatch

POLL_SECONDS = 0.5


class Failure(NamedTuple):
    sample: int  # as in the order, repetitions included
    replacement: int  # image decoded instead, in [0, num_samples); -1: none
    reason: str


def _set_num_threads(cls: type[Compiler], count: int) -> None:
    cls.num_threads = count
    numba.set_num_threads(count)


# FFCV would set torch's thread count for the whole process as well, in each epoch: that belongs to trainer.threads.
Compiler.set_num_threads = classmethod(_set_num_threads)


class LeanMemoryMap(OSCacheManager):
    """FFCV's memory map without its Python dictionaries of all samples and pages, which only other managers look into:
    at ImageNet's size they cost seconds at start and 0.5 GB in each rank."""

    def __init__(self, reader: Reader):
        self.reader = reader
        table = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        self.ptrs, self.sizes = (np.ascontiguousarray(table[name]) for name in ("ptr", "size"))
        self.context = OSCacheContext(self)


ffcv.loader.loader.OSCacheManager = LeanMemoryMap  # what os_cache=True makes


class GivenOrder(TraversalOrder):
    """The order that the caller sets. FFCV takes an instance if calling it with the loader gives it back."""

    def __init__(self, samples: np.ndarray):
        self.samples = samples

    def __call__(self, loader: object) -> GivenOrder:
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.samples


class GuardedIterator(EpochIterator):
    """FFCV's producer thread, watched: its exception is raised here, its silence is reported, its end is certain.

    The stock iterator waits for ever on the queue of a thread that has died, and lets a slot be filled anew while the GPU
    has yet to copy it.
    """

    def __init__(self, loader: object, order: np.ndarray, *, rank: int, stall_warning: float, timeout: float):
        self.error: BaseException | None = None
        self.start_watch = partial(StallWatch, rank, stall_warning, timeout)
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # whatever it is, it is raised again where batches are asked for
            self.error = error

    def run_pipeline(self, number: int, samples: np.ndarray, slot: int, copied: torch.cuda.Event | None) -> tuple:
        """Decode a batch into a slot, once what was asked of the GPU with its last content is done.

        FFCV only makes a stream wait for that event, while the decoder writes from the host: wherever the loader is faster
        than the GPU, images would be overwritten under their labels.
        """
        if copied is not None:
            copied.synchronize()
        return super().run_pipeline(number, samples, slot, copied)

    def __next__(self) -> tuple:
        watch = self.start_watch()
        while True:
            try:
                item = self.output_queue.get(timeout=POLL_SECONDS)
                break
            except Empty:
                if not self.is_alive() and self.output_queue.empty():
                    cause = f"{type(self.error).__name__}: {self.error}" if self.error else "it ended without a word"
                    raise RuntimeError(f"the data loader's thread of {watch.where} failed: {cause}") from self.error
                watch.check()
        if item is None:
            self.close()
            raise StopIteration
        slot, result = item
        if IS_CUDA:
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return result

    def close(self) -> None:
        """End the thread: at once if it is done, else when it next finds its queue full, half a second later."""
        self.terminate_event.set()
        for _ in range(5):
            self.join(timeout=1.0)
            if not self.is_alive():
                break
            # It may be putting its last word, for which it would wait for ever.
            with suppress(Empty):
                self.output_queue.get_nowait()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)


class StockAugment:
    """FFCV's own decoder and crop, then everything else with Pillow in threads.

    The crop box comes from numba's thread-local generators: it cannot be reproduced. Flip, padding and operations are
    keyed as everywhere. A damaged JPEG goes unnoticed.
    """

    def __init__(self, plan: AugmentPlan, num_workers: int):
        self.plan = plan
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="augment")

    def decoder(self) -> Operation:
        size, config = (self.plan.image_size, self.plan.image_size), self.plan.config
        if config.random_crop:
            return RandomResizedCropRGBImageDecoder(size, scale=config.crop_scale, ratio=config.crop_ratio)
        return CenterCropRGBImageDecoder(size, ratio=1)

    def finish(self, images: np.ndarray, samples: np.ndarray, epoch: int) -> None:
        """Flip, pad and apply the operations, in place on (B, S, S, 3) uint8."""

        def one(position: int) -> None:
            key = keyed_random.sample_key(self.plan.seed, epoch, int(samples[position]))
            images[position] = np.asarray(finished(Image.fromarray(images[position]), key, self.plan))

        list(self.threads.map(one, range(len(samples))))

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def image_pipeline(decoder: Operation) -> dict[str, PipelineSpec | None]:
    """FFCV reads and decodes the images alone; labels are in memory already and need no generated code."""
    return {"image": PipelineSpec("image", decoder=decoder), "label": None}


def image_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) array -> (B, 3, H, W) tensor over the same memory, which is channels_last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
