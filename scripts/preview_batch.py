"""Write what the model will really see: training samples as a PNG, with the configuration of a run.

    python scripts/preview_batch.py data=folder data.path=DIR model=mambavision_t --out preview.png
    python scripts/preview_batch.py experiment=demo data.path=DIR --epoch 3 --step 10

Everything else on the command line is what train.py takes. Crop, flip, operations, erasing, mixup and CutMix are those
of that very step; above each image stand its classes and their shares.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import TrainLoader, build_train_loader
from data.batch_transform import BatchTransform
from mambavision.compose import compose_train_config
from mambavision.config import TrainConfig

CAPTION_HEIGHT = 12
MARGIN = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="preview.png", help="the PNG to write (default preview.png)")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--step", type=int, default=0, help="step within the epoch")
    parser.add_argument("--count", type=int, default=64, help="images shown, at most one micro-batch")
    args, overrides = parser.parse_known_args(arguments)
    try:
        check_arguments(args)
        cfg = compose_train_config(overrides)
        loader = open_loader(cfg)
    except (ValueError, OSError) as error:
        print(f"preview_batch: {error}", file=sys.stderr)
        return 2
    if not 0 <= args.step < loader.steps_per_epoch:
        print(f"preview_batch: --step {args.step} is not in 0 to {loader.steps_per_epoch - 1}", file=sys.stderr)
        return 2
    transform = BatchTransform(cfg.augment, cfg.data.mean, cfg.data.std, loader.num_classes, seed=cfg.seed)
    batch = next(loader.epoch(args.epoch, args.step))
    images, targets = transform(batch, args.epoch, args.epoch * loader.steps_per_epoch + args.step, 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.data.mean, cfg.data.std))
    shown = ((images[: args.count] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    captions = [caption(row) for row in targets[: args.count]]
    loader.close()
    grid(shown.permute(0, 2, 3, 1).numpy(), captions).save(args.out)
    print(f"{args.out}: {len(captions)} samples of epoch {args.epoch}, step {args.step}, {shown.shape[-1]} px")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: what cannot be shown or written, with what to give.
    """
    out = Path(args.out)
    if args.epoch < 0:
        raise ValueError(f"--epoch {args.epoch}: epochs count from 0")
    if args.count < 1:
        raise ValueError(f"--count {args.count}: show at least 1 image")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: give a name that ends in .png, e.g. preview.png")
    if not out.parent.is_dir():
        raise ValueError(f"--out: the directory {out.parent} does not exist; make it, or give another path")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out: {out} cannot be written; give a path in a directory of yours")


def open_loader(cfg: TrainConfig) -> TrainLoader:
    """The run's loader; for a set smaller than its global batch, one with as large a batch as there is."""
    given = cfg.trainer.global_batch_size
    try:
        return build_loader(cfg, given, cfg.trainer.micro_batch_size)
    except ValueError:
        # How many images there are, a loader says; where none can be had, the reason is another one.
        least = math.lcm(2, cfg.data.repeated_augmentation)  # mixup pairs images
        probe = build_loader(cfg, least, least)
        images = probe.num_samples
        probe.close()
        micro = min(cfg.trainer.micro_batch_size, images) // least * least
        if images >= given or micro == 0:
            raise
    fitting = images // micro * micro
    print(
        f"preview_batch: {images} images are fewer than trainer.global_batch_size={given}; shown with {fitting}",
        file=sys.stderr,
    )
    return build_loader(cfg, fitting, micro)


def build_loader(cfg: TrainConfig, global_batch_size: int, micro_batch_size: int) -> TrainLoader:
    return build_train_loader(
        cfg.data,
        cfg.augment,
        seed=cfg.seed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def caption(target: torch.Tensor) -> str:
    """The classes that have more than label smoothing's share."""
    shares, classes = target.topk(min(2, len(target)))
    floor = target.min() + 0.01
    return " ".join(
        f"{number} {share:.2f}" for share, number in zip(shares.tolist(), classes.tolist()) if share > floor
    )


def grid(images, captions: list[str]) -> Image.Image:
    columns = math.ceil(math.sqrt(len(images)))
    side = images.shape[1]
    width, height = max(side, 72) + MARGIN, side + CAPTION_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, captions)):
        left, top = number % columns * width, number // columns * height
        draw.text((left + 1, top), text, fill="black")
        sheet.paste(Image.fromarray(image), (left, top + CAPTION_HEIGHT))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
