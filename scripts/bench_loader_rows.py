"""What bench_loader.py compares: for each row, its loader over the same JPEGs, and how an epoch of it is run.

A row is made from a directory with train.beton and files/, and the command line's workers, batch and image_size. What one
row alone needs is imported where it is made.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from data import build_train_loader
from data.beton import open_beton
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
