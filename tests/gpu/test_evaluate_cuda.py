"""An evaluation on a CUDA device: sets with rules of their own, and the answers to each image."""

import torch

from data.batch import Batch
from data.variants import EvalSet
from mambavision.distributed import World
from mambavision.engine.evaluate import evaluate
from mambavision.engine.predictions import Predictions


class Images(list):
    """One batch of three images; each of them accepts class 1 alone, as ReaL lists them."""

    acceptable = torch.tensor([[False, True]] * 3)
    eval_set = EvalSet("imagenet_real", acceptable=acceptable)
    class_names = None


def test_answers_meet_the_numbers_that_stay_on_the_host(cuda, tmp_path):
    images = torch.tensor([0, 1, 1], dtype=torch.uint8).view(3, 1, 1, 1)
    loader = Images([Batch(images, torch.tensor([0, 1, 0]), torch.tensor([2, 0, 1]))])
    answers = Predictions("", loader)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 2)).to(cuda)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.5, 0.0]))
    result = evaluate(
        {"": model},
        loader,
        prepare=torch.Tensor.float,
        autocast=lambda: torch.autocast("cuda", enabled=False),
        world=(world := World(0, 1, 0, 1, cuda)),
        answered=answers.add,
    )
    answers.write(tmp_path / "p.csv", world)
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert [(row[0], row[4]) for row in rows] == [("0", "1"), ("1", "1"), ("2", "0")]
    assert abs(result["top1"] - 200 / 3) < 1e-6
