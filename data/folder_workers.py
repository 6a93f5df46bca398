"""Worker processes of the folder loader: a persistent DataLoader that is given its batches, watched.

What a sample is, data/folder.py says.
"""

from __future__ import annotations

import atexit
import ctypes
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.batch import workers_per_rank
from data.corrupt import CorruptImages
from data.datasets import FolderSource
from data.stall import StallWatch
from mambavision.config import DataConfig

POLL_SECONDS = 5.0  # how long a dead worker may go unnoticed
PR_SET_PDEATHSIG = 1


class Task(NamedTuple):
    """One sample to make; `image_size` and `epoch` matter in training only."""

    sample: int
    epoch: int = 0
    image_size: int = 0


class Made(NamedTuple):
    """One sample made. `image` is None where nothing readable was found; `failures` are (image, reason)."""

    image: np.ndarray | None
    target: int
    sample: int
    failures: tuple[tuple[int, str], ...]


class MadeBatch(NamedTuple):
    images: torch.Tensor  # (B, S, S, 3) uint8
    targets: torch.Tensor
    samples: torch.Tensor
    failures: list[tuple[int, str]]


def collate(samples: list[Made]) -> MadeBatch:
    readable = [made for made in samples if made.image is not None]
    return MadeBatch(
        images=torch.from_numpy(np.stack([made.image for made in readable])) if readable else torch.empty(0),
        targets=torch.tensor([made.target for made in readable], dtype=torch.int64),
        samples=torch.tensor([made.sample for made in readable], dtype=torch.int64),
        failures=[failure for made in samples for failure in made.failures],
    )


class WorkerSetup:
    """What a worker process does first: outlive signals meant for the run, not the run itself."""

    def __init__(self) -> None:
        # The death signal follows the thread that forks: only the main thread lives as long as its process.
        self.dies_with_parent = threading.current_thread() is threading.main_thread() and sys.platform == "linux"

    def __call__(self, worker: int) -> None:
        # SLURM and Ctrl-C signal every process; stopping is the trainer's decision, at a step boundary.
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        torch.set_num_threads(1)
        if self.dies_with_parent:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class BatchSampler:
    """The tasks of the batches to come, set anew for each pass, which ends the one before."""

    def __init__(self) -> None:
        self.batches: Sequence[np.ndarray] = ()  # sample numbers of each batch
        self.epoch = 0
        self.image_size = 0

    def __iter__(self) -> Iterator[list[Task]]:
        batches = self.batches
        for samples in batches:
            if self.batches is not batches:
                return
            yield [Task(sample, self.epoch, self.image_size) for sample in samples.tolist()]

    def __len__(self) -> int:
        return len(self.batches)


class Workers:
    """A persistent DataLoader that is given its batches, reports stalls and names the failures."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, *, source: FolderSource, rank: int, context: str | None = None
    ):
        self.source = source
        self.start_watch = partial(StallWatch, rank, data.stall_warning_seconds, data.timeout_seconds)
        self.sampler = BatchSampler()
        self._under_way: Iterator[MadeBatch] | None = None
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            num_workers=workers_per_rank(data.num_workers),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            timeout=POLL_SECONDS,
            worker_init_fn=WorkerSetup(),
            persistent_workers=True,
            prefetch_factor=4,
            multiprocessing_context=context,
        )
        _open.add(self)

    def run(
        self,
        batches: Sequence[np.ndarray],
        corrupt: CorruptImages,
        consequence: str,
        *,
        epoch: int = 0,
        image_size: int = 0,
    ) -> Iterator[MadeBatch]:
        self._finish_pass()
        self.sampler.batches, self.sampler.epoch, self.sampler.image_size = batches, epoch, image_size
        iterator = self._under_way = iter(self.loader)
        for _ in batches:
            if self.sampler.batches is not batches:
                raise RuntimeError("this pass over the data was ended by the one that was begun after it")
            made = self._next(iterator)
            for image, reason in made.failures:
                corrupt.report(str(self.source.path(image)), reason, consequence)
            yield made
        self._under_way = None

    def _finish_pass(self) -> None:
        """Take what the workers still have in hand of a pass that was given up: torch itself would wait POLL_SECONDS."""
        iterator, self._under_way = self._under_way, None
        self.sampler.batches = ()
        with suppress(StopIteration):
            while iterator is not None:
                self._next(iterator)

    def _next(self, iterator: Iterator[MadeBatch]) -> MadeBatch:
        watch = self.start_watch()
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                # torch says both in a RuntimeError: that nothing came in time, and that a worker is dead.
                if "timed out" not in str(error):
                    raise RuntimeError(f"a data worker of {watch.where} failed: {error}") from error
                watch.check()

    def close(self) -> None:
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                # It waits for a file system that is away and ignores SIGTERM: at exit multiprocessing would wait for it.
                if worker.is_alive():
                    worker.kill()
                    worker.join(1.0)


_open: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's own exit, which sends its daemons SIGTERM and waits: ours ignore it."""
    for workers in list(_open):
        workers.close()
