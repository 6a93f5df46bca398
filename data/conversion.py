"""From a source of images to a .beton with its manifest: encoding in worker processes, one writer, no half files."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import io
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from data import keyed_random
from data.beton import JPG, MAX_SIDE, MIN_PAGE_SIZE, RAW, BetonWriter, EncodedImage, open_beton, remove_leftovers
from data.class_names import first_difference
from data.datasets import Source
from data.manifest import Manifest, manifest_path, verify, write_manifest
from data.pixels import UNREADABLE, read_whole, why_unreadable

WRITE_MODES = ("smart", "jpg", "raw", "proportion", "original")
SMART_RAW_BYTES = 64 * 1024  # smart: an image of at most so many bytes is stored uncompressed (147 px square)
LARGE_PAGE_SIZE = 16 << 20  # for images that may be larger than a small page
CHUNK = 16  # images handed to a worker at a time
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class WriteSettings:
    max_resolution: int | None = 500  # longer side, px; larger images are reduced (area average)
    quality: int = 90  # of JPEG, 1 to 100
    write_mode: str = (
        "smart"  # jpg | raw | smart (raw when small) | proportion (a share as jpg) | original (bytes kept)
    )
    jpg_share: float = 0.5  # with proportion

    def __post_init__(self) -> None:
        if self.write_mode not in WRITE_MODES:
            raise ValueError(f"write mode {self.write_mode!r} is not known; modes are {', '.join(WRITE_MODES)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality} has to be from 1 to 100")
        if not 0.0 <= self.jpg_share <= 1.0:
            raise ValueError(f"JPEG share {self.jpg_share} has to be from 0 to 1: a share of the images")
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ValueError(f"maximum resolution {self.max_resolution} has to be at least 1 px")

    @property
    def page_size(self) -> int:
        side = self.max_resolution or MAX_SIDE
        return MIN_PAGE_SIZE if 3 * side * side <= MIN_PAGE_SIZE else LARGE_PAGE_SIZE


@dataclass(frozen=True)
class Unreadable:
    reason: str


class UnreadableImage(RuntimeError):
    """An image cannot be read and the policy is to stop."""


def encode(content: bytes | np.ndarray, settings: WriteSettings, index: int) -> EncodedImage:
    """An image as it is stored. Raises one of pixels.UNREADABLE for bytes that are not a whole image."""
    keepable = False
    if isinstance(content, bytes):
        image, keepable = read_whole(content)
    else:
        image = Image.fromarray(content)
    longest = max(image.size)
    if settings.max_resolution is not None and longest > settings.max_resolution:
        ratio = settings.max_resolution / longest
        image = image.resize([max(1, round(side * ratio)) for side in image.size], Image.Resampling.BOX)
        keepable = False
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width}x{image.height} px is more than a .beton can say ({MAX_SIDE}); set a maximum")
    if settings.write_mode == "original" and keepable:
        return EncodedImage(JPG, *image.size, content)
    if _stored_raw(image, settings, index):
        return EncodedImage(RAW, *image.size, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality)
    return EncodedImage(JPG, *image.size, buffer.getvalue())


def _stored_raw(image: Image.Image, settings: WriteSettings, index: int) -> bool:
    if settings.write_mode == "smart":
        return 3 * image.width * image.height <= SMART_RAW_BYTES
    if settings.write_mode == "proportion":
        return keyed_random.Draws(0, index).uniform(0) >= settings.jpg_share
    return settings.write_mode == "raw"


def already_written(path: Path, source: Source) -> Manifest | None:
    """The manifest of a whole file of that name, written from `source`; None where there is nothing.

    Raises ValueError for a damaged file, one of another source, and one without a manifest: FFCV itself writes such.
    """
    if not path.exists():
        return None
    if not manifest_path(path).exists():
        raise ValueError(
            f"{path} is there without a manifest, so it was not written by scripts/prepare_data.py or only copied in "
            "part; give another --out, or --force to write over it"
        )
    manifest = verify(open_beton(path))
    if os.path.realpath(manifest.source) != os.path.realpath(source.origin):  # one directory has several names
        raise ValueError(
            f"{path} was written from {manifest.source}, not from {source.origin}; "
            "give another --out, or --force to write over it"
        )
    return manifest


def changed_settings(manifest: Manifest, settings: WriteSettings) -> list[str]:
    """`quality 90, not 50` for each setting that the file was written with and now would not be."""
    now = dataclasses.asdict(settings)
    before = {name: manifest.settings.get(name) for name in now}
    return [f"{name} {before[name]}, not {now[name]}" for name in now if before[name] != now[name]]


def changed_source(manifest: Manifest, source: Source) -> list[str]:
    """What the source has become since the file was written: other classes, another number of images."""
    difference = first_difference(manifest.classes, source.classes)
    before, now = manifest.num_samples + len(manifest.unreadable), len(source.names)
    return [difference] * bool(difference) + [f"{before} images, which are {now} now"] * (before != now)


def write_beton(
    source: Source,
    path: str | Path,
    settings: WriteSettings,
    *,
    num_workers: int,
    on_unreadable: str = "skip",
    progress: Callable[[int], None] = lambda images: None,
) -> Manifest:
    """Write all images of `source` in its order, and the manifest and names beside them.

    The same input gives the same bytes whatever `num_workers`. Raises UnreadableImage with on_unreadable="stop",
    RuntimeError when a worker dies or another process writes this file, OSError when the disk is full; none of them
    leaves a file under the final name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path):
        return _write(source, path, settings, num_workers, on_unreadable, progress)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Holds `<name>.lock`, which names the process; a second writer is refused with a RuntimeError.

    The lock ends with its process, however that ends. Where a filesystem has no locks nobody is refused: there the
    partial names, each writer's own, keep the file whole.
    """
    lock = path.with_name(f"{path.name}.lock")
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            locked = _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            advice = "wait for it, or stop it, or give another --out"
            raise RuntimeError(f"{path} is being written by {holder}; {advice}") from None
        if locked:
            remove_leftovers(path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _lock(file: IO[str]) -> bool:
    """False where the filesystem has no locks. Raises BlockingIOError when another process holds this one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    if os.fstat(file.fileno()).st_nlink == 0:
        raise BlockingIOError("its holder ended, and removed the file, after it was opened here")
    return True


def _write(
    source: Source,
    path: Path,
    settings: WriteSettings,
    num_workers: int,
    on_unreadable: str,
    progress: Callable[[int], None],
) -> Manifest:
    writer = BetonWriter(path, max_samples=len(source.names), page_size=settings.page_size)
    unreadable: list[dict[str, str]] = []
    written: list[int] = []
    try:
        for index, image in enumerate(_encoded(source, settings, num_workers)):
            if isinstance(image, EncodedImage):
                writer.add(image, int(source.labels[index]))
                written.append(index)
            else:
                unreadable.append({"path": source.names[index], "reason": image.reason})
                if on_unreadable == "stop":
                    raise UnreadableImage(
                        f"{source.origin}: {source.names[index]} cannot be read: {image.reason}; "
                        "repair or remove it, or give --on-unreadable skip"
                    )
            progress(1)
        if not written:
            raise ValueError(f"{source.origin}: none of its {len(source.names)} images can be read")
        num_bytes = writer.complete()
        manifest = Manifest(
            num_samples=len(written),
            classes=list(source.classes),
            class_counts=np.bincount(source.labels[written], minlength=len(source.classes)).tolist(),
            num_bytes=num_bytes,
            index_hash=writer.index_hash,
            data_hash=writer.data_hash.hexdigest(),
            settings=dataclasses.asdict(settings),
            source=source.origin,
            unreadable=unreadable,
        )
        write_manifest(path, manifest, [source.names[index] for index in written])
        writer.publish()
    except BaseException:  # also Ctrl-C and SIGTERM: whatever ends the writing, nothing half-written stays
        writer.discard()
        raise
    return manifest


def _encoded(source: Source, settings: WriteSettings, num_workers: int) -> Iterator[EncodedImage | Unreadable]:
    """Encoded images in order, from a pool whose dead workers are noticed."""
    chunks = (range(start, min(start + CHUNK, len(source.names))) for start in range(0, len(source.names), CHUNK))
    # The death signal follows the thread that forks: only the main thread lives as long as its process.
    dies_with_parent = threading.current_thread() is threading.main_thread() and sys.platform == "linux"
    start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context(start_method),
        initializer=_start_worker,
        initargs=(source, settings, dies_with_parent),
    )
    try:
        pending = deque(pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 3 * num_workers))
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 1))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died while images were encoded (out of memory, or killed); "
            "give a smaller --num-workers and start again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Source, WriteSettings]


def _start_worker(source: Source, settings: WriteSettings, dies_with_parent: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends its workers by it; the parent's handler is not theirs
    if dies_with_parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _worker = source, settings


def _encode_chunk(indices: range) -> list[EncodedImage | Unreadable]:
    source, settings = _worker
    images: list[EncodedImage | Unreadable] = []
    for index in indices:
        try:
            images.append(encode(source.read(index), settings, index))
        except UNREADABLE as error:
            images.append(Unreadable(why_unreadable(error)))
    return images
