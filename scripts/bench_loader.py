"""Images per second of this loader and of its peers, on the same images, with the same number of workers.

    python scripts/bench_loader.py --data DIR_OR_TAR [--workers 2 --batch 64 --image-size 224 --repeats 5 --json FILE]

Any images will do. They are written once as JPEGs of at most 500 px and quality 90, to a .beton and as single files
with the same bytes, so that every row decodes the same data. The rows take turns in each repeat, and a ratio is the
median of the ratios within repeats: what else the machine does then hits all alike. On a busy machine compare the CPU
time per image, which other work disturbs little.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path

import numpy as np
import torch
from bench_loader_rows import CROP_AND_FLIP, ROWS, WHAT, keyed_loader, stock_loader

from data.beton import open_beton
from data.conversion import WriteSettings, write_beton
from data.datasets import IMAGE_SUFFIXES, FolderSource

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
        print(first_batch_seconds(args.first_batch, Path(args.data), args), flush=True)
        os._exit(0)  # the loaders' threads are at work on the next batches, and stock FFCV's abort an orderly end
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
