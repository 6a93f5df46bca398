"""Images per second of this loader and of its peers, on the same images, with the same number of workers.

    python scripts/bench_loader.py --data DIR_OR_TAR [--workers 2 --batch 64 --image-size 224 --repeats 5 --json FILE]

Any images will do. They are written once as JPEGs of at most 500 px and quality 90, to a .beton and as single files
with the same bytes, so that every row decodes the same data. The rows take turns in each repeat, and a ratio is the
median of the ratios within repeats: what else the machine does then hits all alike. On a busy machine compare the CPU
time per image, which other work disturbs little.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import build_train_loader
from data.beton import open_beton
from data.conversion import WriteSettings, write_beton
from data.datasets import IMAGE_SUFFIXES, FolderSource
from mambavision.config import AugmentConfig, DataConfig

DATA = DataConfig()
CROP_AND_FLIP = AugmentConfig(auto_augment="none", erasing_prob=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
FULL = replace(CROP_AND_FLIP, auto_augment="rand-m9-mstd0.5-inc1", erasing_prob=0.25)
WHAT = {  # row: what it does, type of its images
    "torchvision_pil": ("DataLoader processes, PIL decode, RandomResizedCrop, flip", "uint8"),
    "torchvision_io": ("DataLoader processes, torchvision.io decode, v2 RandomResizedCrop, flip", "uint8"),
    "ffcv": ("stock FFCV: RandomResizedCrop, flip", "uint8"),
    "ours": ("this loader: keyed crop, random interpolation, flip", "uint8"),
    "ours_full_recipe": ("this loader: crop, flip, RandAugment; normalise, erasing", "float32"),
    "torchvision_timm_full": ("DataLoader processes, PIL: crop, flip, timm RandAugment; normalise, erasing", "float32"),
    "decode_bound": ("libjpeg-turbo, whole images, pixels dropped", "-"),
}
RATIOS = (
    ("ours", "ffcv"),
    ("ours", "torchvision_pil"),
    ("ours", "torchvision_io"),
    ("ours_full_recipe", "torchvision_timm_full"),
    ("ours", "decode_bound"),
    ("ffcv", "decode_bound"),
)


def main() -> None:
    args = parse()
    if args.first_batch:
        print(first_batch_seconds(args.first_batch, Path(args.data), args))
        return
    torch.set_num_threads(1)  # as in a DataLoader's workers: the cores belong to the --workers
    with tempfile.TemporaryDirectory(prefix="bench_loader-") as temporary:
        directory = prepare(Path(args.data).expanduser(), Path(temporary), args)
        rows = {name: make(directory, args) for name, make in ROWS.items() if name in args.rows}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in rows}
        for repeat in range(args.repeats + 1):  # the first round warms up and is not counted
            for name, epoch in rows.items():
                start, cpu_start = time.perf_counter(), cpu_clock()
                images = epoch(repeat)
                if repeat:
                    seconds[name].append((time.perf_counter() - start) / images)
                    cpu_seconds[name].append((cpu_clock() - cpu_start) / images)
        first = {name: measure_first_batch(name, directory, args) for name in ("ffcv", "ours") if name in rows}
    report(seconds, cpu_seconds, first, args)


def cpu_clock() -> float:
    """CPU seconds of this process and of its children that live, threads included: little disturbed by a busy machine."""
    if not sys.platform.startswith("linux"):
        return math.nan
    total = time.process_time()
    for child in multiprocessing.active_children():  # the workers of a DataLoader
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory (searched) or .tar with images")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads or processes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=960, help="images an epoch; fewer files are used repeatedly")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--first-batch", choices=("ffcv", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(data: Path, directory: Path, args: argparse.Namespace) -> Path:
    """Write train.beton and files/ with the same JPEGs. Returns `directory`."""
    if data.is_file():
        with tarfile.open(data) as archive:
            archive.extractall(directory / "source", filter="data")
        data = directory / "source"
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise SystemExit(f"{data} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    samples = args.samples // args.batch * args.batch
    chosen = [names[i % len(names)] for i in range(samples)]
    source = FolderSource(data, chosen, np.zeros(samples, dtype=np.int64), ["all"])
    write_beton(source, directory / "train.beton", WriteSettings(500, 90, "jpg"), num_workers=args.workers)
    beton = open_beton(directory / "train.beton")
    (directory / "files").mkdir()
    for index in range(len(beton)):
        (directory / "files" / f"{index:05d}.jpg").write_bytes(beton.stored(index).data)
    return directory


Epoch = Callable[[int], int]  # runs epoch number n, returns how many images came out


def ours(directory: Path, args: argparse.Namespace) -> Epoch:
    loader = keyed_loader(directory, args, CROP_AND_FLIP)
    return lambda epoch: sum(len(batch.images) for batch in loader.epoch(epoch))


def ours_full_recipe(directory: Path, args: argparse.Namespace) -> Epoch:
    from data.batch_transform import BatchTransform

    loader = keyed_loader(directory, args, FULL)
    transform = BatchTransform(FULL, DATA.mean, DATA.std, 1, seed=0)

    def run(epoch: int) -> int:
        batches = enumerate(loader.epoch(epoch))
        return sum(len(transform(batch, epoch, step, 0)[0]) for step, batch in batches)

    return run


def keyed_loader(directory: Path, args: argparse.Namespace, augment: AugmentConfig):
    data = replace(DATA, path=str(directory), num_workers=args.workers, image_size=args.image_size)
    return build_train_loader(data, augment, seed=0, global_batch_size=args.batch, micro_batch_size=args.batch)


def ffcv(directory: Path, args: argparse.Namespace) -> Epoch:
    loader = stock_loader(directory, args)
    return lambda epoch: sum(len(images) for (images,) in loader)


def stock_loader(directory: Path, args: argparse.Namespace):
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((args.image_size, args.image_size))
    return Loader(
        str(directory / "train.beton"),
        batch_size=args.batch,
        num_workers=args.workers,
        order=OrderOption.RANDOM,
        seed=0,
        pipelines={"image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()], "label": None},
    )


class Files(Dataset):
    def __init__(self, directory: Path, read: Callable, transform: Callable):
        self.paths = sorted(str(path) for path in (directory / "files").iterdir())
        self.read, self.transform = read, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.read(self.paths[index]))


def torch_epochs(dataset: Files, args: argparse.Namespace) -> Epoch:
    loader = DataLoader(
        dataset, batch_size=args.batch, shuffle=True, num_workers=args.workers, persistent_workers=True, drop_last=True
    )
    return lambda epoch: sum(len(images) for images in loader)


def open_rgb(path: str):
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def torchvision_pil(directory: Path, args: argparse.Namespace) -> Epoch:
    from torchvision import transforms as v1

    steps = [v1.RandomResizedCrop(args.image_size), v1.RandomHorizontalFlip(), v1.PILToTensor()]
    return torch_epochs(Files(directory, open_rgb, v1.Compose(steps)), args)


def torchvision_io(directory: Path, args: argparse.Namespace) -> Epoch:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(args.image_size, antialias=True), v2.RandomHorizontalFlip()])
    return torch_epochs(Files(directory, lambda path: decode_image(path, ImageReadMode.RGB), steps), args)


def torchvision_timm_full(directory: Path, args: argparse.Namespace) -> Epoch:
    from timm.data import auto_augment, create_transform

    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    # timm asks for 0 bits at full magnitude: earlier Pillows made that black, Pillow 13 refuses it.
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **options: (
        posterize(image, bits, **options) if bits else image.point(lambda value: 0)
    )
    erasing = {"re_prob": FULL.erasing_prob, "re_mode": "pixel", "mean": DATA.mean, "std": DATA.std}
    size, policy = args.image_size, FULL.auto_augment
    transform = create_transform(size, is_training=True, auto_augment=policy, interpolation="random", **erasing)
    return torch_epochs(Files(directory, open_rgb, transform), args)


def decode_bound(directory: Path, args: argparse.Namespace) -> Epoch:
    from data.native_library import load_library

    library, beton = load_library(), open_beton(directory / "train.beton")
    images = [beton.stored(index).data for index in range(len(beton))]
    buffers = [(ctypes.create_string_buffer(data, len(data)), len(data)) for data in images]
    threads = ThreadPoolExecutor(args.workers)

    def share(queue: Iterator[int]) -> int:
        done = 0
        for index in queue:  # one iterator for all threads: each takes the next image
            data, size = buffers[index]
            assert library.loader_decode_whole(ctypes.addressof(data), size) == 0
            done += 1
        return done

    def run(epoch: int) -> int:
        queue = iter(range(len(buffers)))
        return sum(threads.map(share, [queue] * args.workers))

    return run


ROWS: dict[str, Callable[[Path, argparse.Namespace], Epoch]] = {
    "torchvision_pil": torchvision_pil,
    "torchvision_io": torchvision_io,
    "ffcv": ffcv,
    "ours": ours,
    "ours_full_recipe": ours_full_recipe,
    "torchvision_timm_full": torchvision_timm_full,
    "decode_bound": decode_bound,
}


def measure_first_batch(name: str, directory: Path, args: argparse.Namespace) -> float:
    """Seconds from a loader's construction to its first batch, in a fresh process, imports not counted."""
    command = [sys.executable, __file__, f"--data={directory}", f"--first-batch={name}", f"--workers={args.workers}"]
    command += [f"--batch={args.batch}", f"--image-size={args.image_size}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def first_batch_seconds(name: str, directory: Path, args: argparse.Namespace) -> float:
    import ffcv.loader  # noqa: F401

    import data.ffcv_loader  # noqa: F401

    start = time.perf_counter()
    if name == "ffcv":
        next(iter(stock_loader(directory, args)))
    else:
        next(keyed_loader(directory, args, CROP_AND_FLIP).epoch(0))
    return time.perf_counter() - start


def report(
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    first: dict[str, float],
    args: argparse.Namespace,
) -> None:
    results, ratios, cpu_ratios = [], {}, {}
    setting = f"{args.workers} workers, batch {args.batch}, {args.image_size} px"
    print(f"{setting}, n = {args.repeats} epochs of {args.samples} images; CPU: milliseconds of a core per image")
    for name, times in seconds.items():
        rates, cpu = sorted(1.0 / t for t in times), 1e3 * statistics.median(cpu_seconds[name])
        what, dtype = WHAT[name]
        median, spread = statistics.median(rates), rates[-1] - rates[0]
        print(f"{name:22s}{median:6.0f} img/s {rates[0]:6.0f} to {rates[-1]:5.0f} {cpu:8.2f} CPU   {what}")
        row = {"name": name, "mode": what, "dtype": dtype, "img_per_sec": median, "n": len(rates), "spread": spread}
        results.append({**row, "cpu_ms_per_image": cpu})
    for over, under in RATIOS:
        if over in seconds and under in seconds:
            name = f"{over}/{under}"
            pairs, cpu_pairs = ([u / o for o, u in zip(t[over], t[under])] for t in (seconds, cpu_seconds))
            ratios[name], cpu_ratios[name] = statistics.median(pairs), statistics.median(cpu_pairs)
            print(
                f"{name}: {ratios[name]:.2f} ({min(pairs):.2f} to {max(pairs):.2f}), by CPU time {cpu_ratios[name]:.2f}"
            )
    for name, value in first.items():
        print(f"first batch, {name}: {value:.2f} s")
    if args.json:
        machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "platform": platform.platform()}
        content = {"machine": machine, "results": results, "ratios": ratios, "cpu_ratios": cpu_ratios}
        Path(args.json).write_text(json.dumps({**content, "first_batch_seconds": first}, indent=1) + "\n")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
