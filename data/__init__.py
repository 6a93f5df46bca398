"""The data path: order, loaders, augmentation. `build_train_loader` and `build_eval_loader` are the doors.

A source is imported when it is asked for: ffcv takes seconds to import, the others are to start at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from data.batch import Batch, EvalLoader, TrainLoader
from data.order import EpochPlan, epoch_order
from mambavision.config import AugmentConfig, DataConfig

__all__ = ["Batch", "EpochPlan", "EvalLoader", "TrainLoader", "build_eval_loader", "build_train_loader", "epoch_order"]

SOURCES = ("ffcv", "folder", "synthetic")


def build_train_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """The loader of this rank's training micro-batches.

    Raises ValueError, with advice, for batch sizes that do not divide, data that is not there or is damaged.
    """
    batches = dict(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        repeats=data.repeated_augmentation,
    )
    if data.source == "synthetic":
        from data.synthetic import DEFAULT_CLASSES, SyntheticTrainLoader

        return SyntheticTrainLoader(
            EpochPlan(data.synthetic_train_samples, **batches),
            num_classes=data.num_classes or DEFAULT_CLASSES,
            image_size=data.image_size,
            progressive=data.progressive_resolution,
            seed=seed,
        )
    if data.source == "ffcv":
        with keep_torch_threads():
            from data.ffcv_loader import FfcvTrainLoader

        return FfcvTrainLoader(data, augment, seed=seed, batches=batches)
    if data.source == "folder":
        from data.folder import FolderTrainLoader

        return FolderTrainLoader(data, augment, seed=seed, batches=batches)
    raise ValueError(f"data.source={data.source} is not known; sources are {', '.join(SOURCES)}")


def build_eval_loader(
    data: DataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1, split: str = "val"
) -> EvalLoader:
    """The loader of this rank's share of an evaluation set: each sample on one rank, none padded, none dropped.

    `split` is a folder or file of the data set (val), or one of variants.EVAL_SETS; those come with `loader.eval_set`,
    which counts right answers where that is more than comparing with the target.
    """
    share = dict(batch_size=batch_size, rank=rank, world_size=world_size)
    if split.startswith("imagenet_"):
        return _variant_loader(data, split, share)
    if data.source == "synthetic":
        from data.synthetic import DEFAULT_CLASSES, SyntheticEvalLoader

        return SyntheticEvalLoader(
            data.synthetic_eval_samples,
            num_classes=data.num_classes or DEFAULT_CLASSES,
            image_size=data.image_size,
            **share,
        )
    if data.source == "ffcv":
        with keep_torch_threads():
            from data.ffcv_loader import FfcvEvalLoader

        return FfcvEvalLoader(data, split=split, **share)
    if data.source == "folder":
        from data.folder import FolderEvalLoader, split_source

        return FolderEvalLoader(data, split_source(data, split), **share)
    raise ValueError(f"data.source={data.source} is not known; sources are {', '.join(SOURCES)}")


def _variant_loader(data: DataConfig, name: str, share: dict[str, int]) -> EvalLoader:
    from data import variants

    if name not in variants.EVAL_SETS:
        raise ValueError(f"eval_set={name} is not known; sets are {', '.join(variants.EVAL_SETS)}")
    if name == "imagenet_real":
        loader = build_eval_loader(data, **share)
        names = getattr(loader, "names", None)
        if not names:
            raise ValueError(
                "eval_set=imagenet_real needs the names of the images; write the data with prepare_data.py"
            )
        loader.eval_set = variants.real_labels(names)
        return loader
    from data.folder import FolderEvalLoader

    if data.path is None:
        raise ValueError(f"eval_set={name} needs data.path: the directory of the unpacked set")
    source, eval_set = variants.folder_set(name, data.path)
    loader = FolderEvalLoader(data, source, **share)
    loader.eval_set = eval_set
    return loader


@contextlib.contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Importing ffcv sets torch's threads to one for the whole process, which would halve the speed of a CPU run or worse."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
