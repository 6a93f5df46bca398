"""The table of predictions: names of any bytes, sets that choose among some classes, ranks without images."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.batch import Batch
from data.variants import EvalSet
from mambavision.distributed import World
from mambavision.engine.predictions import Predictions, as_csv

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_names_of_any_bytes_come_through():
    files = [os.fsdecode(b"a,\xff\n.jpg"), 'say "cheese".jpg']
    table = as_csv(np.array([[0, 1, 1, 0.75], [1, 0, 1, 1 / 3]]), files, ["cat"])
    rows = list(csv.reader(io.StringIO(os.fsdecode(table), newline="")))
    assert rows == [
        ["index", "file", "target", "target_name", "top1", "top1_name", "top1_prob"],
        ["0", files[0], "1", "", "1", "", "0.75"],
        ["1", files[1], "0", "cat", "1", "", "0.333333"],
    ]


def test_a_set_of_some_classes_has_the_model_choose_among_them(tmp_path: Path):
    loader = SimpleNamespace(eval_set=EvalSet("imagenet_a", torch.tensor([1, 2, 4])), class_names=None)
    answers = Predictions("", loader)
    logits = torch.tensor([[9.0, 1.0, 3.0, 9.0, 2.0, 9.0]])
    answers.add("", logits, Batch(torch.zeros(1), torch.tensor([4]), torch.tensor([0])))
    (row,) = answers.parts[0].tolist()
    assert row[:5] == [0, 4, 2, 4, 1]
    assert row[7:10] == pytest.approx(logits[0, [2, 4, 1]].softmax(0).tolist())


@pytest.mark.slow  # imports what the fake device takes
def test_numbers_that_stay_on_the_host_meet_answers_on_the_device():
    with FakeTensorMode():  # tensors without values, on devices that need not be there
        batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), torch.zeros(4).long()).to("cuda")
        answers = Predictions("", SimpleNamespace())
        answers.add("", torch.zeros(4, 9, device="cuda"), batch)
    assert batch.indices.device.type == "cpu" and answers.parts[0].device.type == "cuda"


def test_rows_are_in_the_order_of_the_data_and_of_one_model_alone(tmp_path: Path):
    answers = Predictions("ema_", SimpleNamespace(class_names=None))
    for indices in ([5, 1], [0, 3]):
        batch = Batch(torch.zeros(2), torch.tensor(indices), torch.tensor(indices))
        answers.add("", torch.zeros(2, 9), batch)
        answers.add("ema_", torch.nn.functional.one_hot(batch.targets, 9).float(), batch)
    answers.write(tmp_path / "p.csv", ALONE)
    rows = list(csv.DictReader((tmp_path / "p.csv").open(newline="")))
    assert [row["index"] for row in rows] == [row["top1"] for row in rows] == ["0", "1", "3", "5"]


def test_without_any_readable_image_there_is_a_header(tmp_path: Path):
    Predictions("", SimpleNamespace(class_names=None)).write(tmp_path / "p.csv", ALONE)
    assert (tmp_path / "p.csv").read_text() == "index,file,target,target_name\n"
