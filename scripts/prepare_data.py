"""Write FFCV files (.beton) from image folders, Fashion-MNIST or ImageNet's archives.

    python scripts/prepare_data.py folder --source DIR --out DIR        DIR/train/<class>/*, DIR/val (or test)/<class>/*
    python scripts/prepare_data.py fashion_mnist --out DIR
    python scripts/prepare_data.py imagenet --train-tar TAR --val-tar TAR --devkit TAR_OR_LABELS --out DIR

Each writes train.beton and val.beton with a manifest (.json) and the samples' names (.names.txt) beside them. A file
that was written from the same source is left alone (--force writes it again), one of other origin is refused; an
interrupted writing leaves nothing under the final name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.batch import workers_per_rank
from data.conversion import WRITE_MODES, WriteSettings, already_written, changed_settings, changed_source, write_beton
from data.datasets import (
    FASHION_FILES,
    Source,
    fashion_mnist,
    find_split,
    imagenet_train,
    imagenet_val,
    imagenet_val_labels,
    list_folder,
)
from data.manifest import read_manifest

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
console = Console(highlight=False)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        args.num_workers = workers_per_rank(args.num_workers, "--num-workers")
        settings = WriteSettings(args.max_resolution, args.quality, args.write_mode, args.jpg_share)
        for split, source in args.sources(args):
            write(source, Path(args.out).expanduser() / f"{split}.beton", settings, args)
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"prepare_data: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("prepare_data: interrupted; nothing half-written was left", style="red")
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, help="directory for train.beton and val.beton")
    common.add_argument("--quality", type=int, default=90, help="JPEG quality (default 90)")
    common.add_argument("--jpg-share", type=float, default=0.5, help="write mode proportion: share stored as JPEG")
    common.add_argument("--num-workers", type=int, help="encoding processes (default: all cores)")
    common.add_argument("--on-unreadable", choices=("skip", "stop"), default="skip", help="leave out and name, or stop")
    common.add_argument("--force", action="store_true", help="write again what is already there")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, sources, resolution, mode in (
        ("folder", folder_sources, 500, "smart"),
        ("imagenet", imagenet_sources, 500, "jpg"),
        ("fashion_mnist", fashion_mnist_sources, 28, "raw"),
    ):
        command = commands.add_parser(name, parents=[common])
        command.set_defaults(sources=sources)
        command.add_argument("--write-mode", choices=WRITE_MODES, default=mode, help=f"how images are stored ({mode})")
        command.add_argument(
            "--max-resolution",
            type=side_or_none,
            default=resolution,
            help=f"longer side in px, 0 keeps all (default {resolution or 0})",
        )
        if name == "folder":
            command.add_argument("--source", required=True, help="directory with train/ and val/ (or test/)")
        elif name == "fashion_mnist":
            command.add_argument("--source", help="directory with the four .gz files (default: found or fetched)")
        else:
            command.add_argument("--train-tar", help="ILSVRC2012_img_train.tar, or class folders")
            command.add_argument("--val-tar", help="ILSVRC2012_img_val.tar, or a flat directory")
            command.add_argument(
                "--devkit", help="ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or a file of WordNet ids"
            )
    return parser.parse_args(arguments)


def side_or_none(text: str) -> int | None:
    return int(text) or None


def write(source: Source, path: Path, settings: WriteSettings, args: argparse.Namespace) -> None:
    if not args.force and (manifest := already_written(path, source)):
        console.print(f"{path} is already there: {manifest.num_samples} images (--force writes it again)")
        if changed := changed_source(manifest, source) + changed_settings(manifest, settings):
            advice = "--force writes it again as asked for now"
            console.print(f"{path} was written with {'; '.join(changed)}: {advice}", style="yellow", markup=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(path.name, total=len(source.names))
        manifest = write_beton(
            source,
            path,
            settings,
            num_workers=args.num_workers,
            on_unreadable=args.on_unreadable,
            progress=lambda images: bar.advance(task, images),
        )
    for item in manifest.unreadable:
        console.print(f"left out, cannot be read: {item['path']}: {item['reason']}", style="yellow", markup=False)
    console.print(
        f"{path}: {manifest.num_samples} images of {len(manifest.classes)} classes, "
        f"{manifest.num_bytes / 1e6:.1f} MB, {len(manifest.unreadable)} unreadable left out"
    )


def folder_sources(args: argparse.Namespace) -> list[tuple[str, Source]]:
    train = list_folder(find_split(args.source, "train", "--source"))
    return [("train", train), ("val", list_folder(find_split(args.source, "val", "--source"), classes=train.classes))]


def imagenet_sources(args: argparse.Namespace) -> list[tuple[str, Source]]:
    """Archives; unpacked folders are a case for `folder`. Classes are the sorted WordNet ids either way."""
    if not args.train_tar and not args.val_tar:
        raise ValueError(
            "imagenet takes --train-tar, --val-tar or both; for unpacked folders use: prepare_data.py folder"
        )
    sources: list[tuple[str, Source]] = []
    if args.train_tar:
        sources.append(("train", imagenet_train(args.train_tar)))
        classes = sources[0][1].classes
    else:  # a val file written later is numbered by the train file that is there
        training = read_manifest(Path(args.out).expanduser() / "train.beton")
        classes = training.classes if training else None
    if args.val_tar:
        if not args.devkit:
            raise ValueError("--val-tar takes --devkit: the archive alone does not say which class an image is of")
        labels = imagenet_val_labels(args.devkit)
        sources.append(("val", imagenet_val(args.val_tar, labels, classes or sorted(set(labels.values())))))
    return sources


def fashion_mnist_sources(args: argparse.Namespace) -> list[tuple[str, Source]]:
    directory = Path(args.source) if args.source else find_fashion_mnist()
    return [(split, fashion_mnist(directory, split)) for split in ("train", "val")]


def find_fashion_mnist() -> Path:
    """The Debian package's directory, installing the package where that is possible, else torchvision's download."""
    if not _has_files(DEBIAN_FASHION_MNIST) and os.geteuid() == 0 and shutil.which("apt-get"):
        console.print("installing the package dataset-fashion-mnist")
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "dataset-fashion-mnist"]
        if subprocess.run(install, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            subprocess.run(["apt-get", "update", "-q"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            subprocess.run(install, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if _has_files(DEBIAN_FASHION_MNIST):
        return DEBIAN_FASHION_MNIST
    root = Path(os.environ.get("MAMBAVISION_CACHE", "~/.cache/mambavision")).expanduser()
    downloaded = root / "FashionMNIST" / "raw"
    if not _has_files(downloaded):
        from torchvision.datasets import FashionMNIST

        console.print(f"downloading Fashion-MNIST to {root}")
        try:
            FashionMNIST(str(root), download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"Fashion-MNIST is not here and cannot be fetched ({error}); install the Debian package "
                "dataset-fashion-mnist, or give --source DIR with its four .gz files"
            ) from error
    return downloaded


def _has_files(directory: Path) -> bool:
    return all((directory / name).is_file() for names in FASHION_FILES.values() for name in names)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is handled as Ctrl-C is
    sys.exit(main())
