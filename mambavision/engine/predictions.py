"""eval.py predictions=FILE.csv: what a model answered to each image. Gathers the answers and writes the file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, EvalLoader
from mambavision.distributed import World, gather_objects
from mambavision.run_dir import write_atomically

_SHOWN = 5


class Predictions:
    """The answers of one of the models that `evaluate` scores: its `add` is what evaluate hands each batch's logits to.

    prefix: which of the models. Probabilities are softmax's, over the classes among which the evaluation set has the
    model choose.
    """

    def __init__(self, prefix: str, loader: EvalLoader):
        self.prefix, self.loader = prefix, loader
        eval_set = getattr(loader, "eval_set", None)
        self.classes = None if eval_set is None else eval_set.classes
        self.parts: list[Tensor] = []  # (B, 2 + 2 k) float64 on the device: sample, target, k classes, k probabilities

    def add(self, prefix: str, logits: Tensor, batch: Batch) -> None:
        """logits: (B, classes) float32 of the model `prefix`. No host sync."""
        if prefix != self.prefix:
            return
        if self.classes is not None:
            among, classes = torch.full_like(logits, -torch.inf), self.classes.to(logits.device)
            among[:, classes] = logits[:, classes]
            logits = among
        best = logits.softmax(dim=1).topk(min(_SHOWN, logits.shape[1]), dim=1)
        indices = batch.indices.to(logits.device, non_blocking=True)  # they come on the host
        asked = torch.stack([indices, batch.targets], dim=1)
        # float64 holds the numbers of samples and classes exactly, so that one tensor holds all.
        self.parts.append(torch.cat([asked.double(), best.indices.double(), best.values.double()], dim=1))

    def write(self, path: Path, world: World) -> None:
        """One row for each image that was scored, in the order of the data set. Collective; rank 0 writes."""
        mine = torch.cat(self.parts).cpu().numpy() if self.parts else None
        shares = [share for share in gather_objects(mine) if share is not None]
        if world.is_main:
            rows = np.concatenate(shares) if shares else np.empty((0, 2))
            rows = rows[np.argsort(rows[:, 0])]
            files = getattr(self.loader, "names", None) or ()
            write_atomically(path, as_csv(rows, files, self.loader.class_names or ()))
            print(f"predictions of the {'EMA ' if self.prefix else ''}weights written to {path}")


def as_csv(rows: np.ndarray, files: Sequence[str], class_names: Sequence[str]) -> bytes:
    """rows: as in `Predictions.parts`. Names that are not known are empty; a file's may hold any bytes."""
    shown = (rows.shape[1] - 2) // 2
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    answers = [f"top{n}{kind}" for n in range(1, shown + 1) for kind in ("", "_name", "_prob")]
    table.writerow(["index", "file", "target", "target_name", *answers])
    for row in rows.tolist():
        index, target, *classes = map(int, row[: 2 + shown])
        cells = [index, _name(files, index), target, _name(class_names, target)]
        for number, probability in zip(classes, row[2 + shown :], strict=True):
            cells += [number, _name(class_names, number), f"{probability:.6g}"]
        table.writerow(cells)
    return os.fsencode(text.getvalue())


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else ""
