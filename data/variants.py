"""ImageNet's other evaluation sets: V2, A, R, Sketch, C and ReaL. Where their images are, how answers are counted.

    set              layout below data.path           classes                     images     from
    imagenet_v2      0/ ... 999/                      1000, folders are numbers   10 000     Recht et al. 2019
    imagenet_a       n01498041/ ...                   200, chosen among those     7 500      Hendrycks et al. 2021
    imagenet_r       n01443537/ ...                   200, chosen among those     30 000     Hendrycks et al. 2021
    imagenet_sketch  n01440764/ ... (or sketch/)      1000                        50 889     Wang et al. 2019
    imagenet_c       gaussian_noise/1/n01440764/ ...  1000, each severity apart   3 750 000  Hendrycks, Dietterich 2019
    imagenet_real    val, as usual                    1000, several answers       46 837     Beyer et al. 2020

Class numbers are positions in the sorted list of the 1000 WordNet ids, as in every published ImageNet model.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets import FolderSource, list_folder

logger = logging.getLogger(__name__)
IMAGES = {
    "imagenet_v2": 10_000,
    "imagenet_a": 7_500,
    "imagenet_r": 30_000,
    "imagenet_sketch": 50_889,
    "imagenet_c": 3_750_000,
    "imagenet_real": 50_000,
}
EVAL_SETS = ("val", *IMAGES)
SUBSETS = {"imagenet_a": "imagenet_a_synsets.txt", "imagenet_r": "imagenet_r_synsets.txt"}

# AlexNet's top-1 errors, by which mCE divides (Hendrycks and Dietterich 2019; numbers of their repository).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


@dataclass(frozen=True)
class EvalSet:
    """How the answers to one set are counted. A plain set needs none of the options."""

    name: str
    classes: Tensor | None = None  # (K,) the class numbers among which the model chooses; None: all
    groups: tuple[str, ...] = ("",)  # images are counted per group (ImageNet-C: corruption/severity)
    group_of: Tensor | None = None  # (N,) group of each image
    acceptable: Tensor | None = None  # (N, 1000) bool: every right answer (ReaL); rows of none are not counted

    def count(self, logits: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
        """Right among 1, right among 5 and images counted, per group: (groups, 3) float64 on the logits' device."""
        if self.classes is not None:
            classes = self.classes.to(logits.device)
            logits, targets = logits[:, classes], torch.searchsorted(classes, targets)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        counted = torch.ones(len(targets), dtype=torch.bool, device=logits.device)
        if self.acceptable is None:
            right = best == targets[:, None]
        else:
            acceptable = self.acceptable[indices].to(logits.device)
            right, counted = acceptable.gather(1, best), acceptable.any(dim=1)
        scores = torch.stack([right[:, 0], right.any(dim=1), counted], dim=1).double()
        group = torch.zeros_like(targets) if self.group_of is None else self.group_of[indices].to(logits.device)
        counts = torch.zeros(len(self.groups), 3, dtype=torch.float64, device=logits.device)
        return counts.index_add_(0, group, scores)

    def metrics(self, counts: Tensor) -> dict[str, float]:
        """From counts summed over all batches and ranks: top1 and top5 in percent, per group and, for C, mce."""
        counts = counts.cpu()
        top1, top5, images = counts.sum(0).tolist()
        result = {"top1": 100 * top1 / max(images, 1), "top5": 100 * top5 / max(images, 1), "images": int(images)}
        if len(self.groups) == 1:
            return result
        accuracy = {name: row[0] / row[2] for name, row in zip(self.groups, counts.tolist()) if row[2]}
        result |= {f"{name}/top1": 100 * value for name, value in accuracy.items()}
        errors: dict[str, list[float]] = {}
        for name, value in accuracy.items():
            errors.setdefault(name.split("/")[0], []).append(1 - value)
        if all(len(errors.get(name, ())) == 5 for name in ALEXNET_ERRORS):
            relative = [np.mean(errors[name]) / alexnet for name, alexnet in ALEXNET_ERRORS.items()]
            result["mce"] = float(100 * np.mean(relative))
        return result


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1000 classes in the order of their numbers."""
    return tuple(_timm_info("imagenet_synsets.txt").split())


def _timm_info(name: str) -> str:
    return importlib.resources.files("timm.data._info").joinpath(name).read_text()


def folder_set(name: str, path: str | Path) -> tuple[FolderSource, EvalSet]:
    """Images and scoring of a set that comes in class folders (all but ReaL). Raises ValueError for another layout."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.path={root} is not a directory; eval_set={name} expects the unpacked set there")
    if name == "imagenet_c":
        source, eval_set = _imagenet_c(root)
    else:
        source = _class_folders(_descend(root), name)
        subset = _timm_info(SUBSETS[name]).split() if name in SUBSETS else None
        classes = None if subset is None else torch.tensor(sorted(wordnet_ids().index(wordnet) for wordnet in subset))
        eval_set = EvalSet(name, classes)
        if classes is not None and not set(source.labels.tolist()) <= set(classes.tolist()):
            raise ValueError(f"{root} holds classes that are not among the {len(classes)} of {name}")
    if len(source.names) != IMAGES[name]:
        logger.warning("%s has %d images, %s here: %d", name, IMAGES[name], root, len(source.names))
    return source, eval_set


def _class_folders(root: Path, name: str) -> FolderSource:
    """The images of class folders, labelled by ImageNet's numbering."""
    source = list_folder(root)
    number = {wordnet: index for index, wordnet in enumerate(wordnet_ids())}
    if name == "imagenet_v2":
        number = {str(index): index for index in range(1000)}
    unknown = [folder for folder in source.classes if folder not in number]
    if unknown:
        wanted = "0 to 999" if name == "imagenet_v2" else "WordNet ids such as n01440764"
        raise ValueError(f"{root} holds the folder {unknown[0]}; the class folders of {name} are {wanted}")
    labels = np.array([number[folder] for folder in source.classes], dtype=np.int64)[source.labels]
    return replace(source, labels=labels, classes=list(wordnet_ids()))


def _descend(root: Path) -> Path:
    """Archives unpack to one folder (imagenet-a/, sketch/): look inside it."""
    folders = [entry for entry in root.iterdir() if entry.is_dir()]
    if len(folders) == 1 and any(entry.is_dir() for entry in folders[0].iterdir()):
        return _descend(folders[0])
    return root


def _imagenet_c(root: Path) -> tuple[FolderSource, EvalSet]:
    """All corruptions and severities below root: <corruption>/<severity>/<class>/<image>."""
    found = [(c.name, s.name) for c in sorted(root.iterdir()) if c.is_dir() for s in sorted(c.iterdir()) if s.is_dir()]
    found = [(corruption, severity) for corruption, severity in found if severity in "12345"]
    if not found:
        raise ValueError(f"{root} does not hold <corruption>/<severity 1 to 5>/<class>/ folders, as ImageNet-C does")
    names, labels, groups = [], [], []
    for group, (corruption, severity) in enumerate(found):
        part = _class_folders(root / corruption / severity, "imagenet_c")
        names += [os.path.join(corruption, severity, name) for name in part.names]
        labels.append(part.labels)
        groups += [group] * len(part.names)
    source = FolderSource(root, names, np.concatenate(labels), list(wordnet_ids()))
    group_names = tuple(f"{corruption}/{severity}" for corruption, severity in found)
    return source, EvalSet("imagenet_c", groups=group_names, group_of=torch.tensor(groups))


def real_labels(names: list[str]) -> EvalSet:
    """ReaL's answers for the images of a validation set, found by the number in ILSVRC2012_val_00000001.JPEG."""
    answers = json.loads(_timm_info("imagenet_real_labels.json"))
    acceptable = torch.zeros(len(names), 1000, dtype=torch.bool)
    for row, name in enumerate(names):
        match = re.search(r"ILSVRC2012_val_(\d{8})", name)
        if match is None or not 1 <= int(match[1]) <= len(answers):
            raise ValueError(f"eval_set=imagenet_real needs ImageNet's validation images by their names; found {name}")
        acceptable[row, answers[int(match[1]) - 1]] = True
    if len(names) != IMAGES["imagenet_real"]:
        logger.warning("imagenet_real labels %d images, here: %d", IMAGES["imagenet_real"], len(names))
    return EvalSet("imagenet_real", acceptable=acceptable)
