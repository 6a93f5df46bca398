"""BatchNorm's running statistics under accumulated gradients: their values, and what a compiler sees of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mambavision import create_model
from mambavision.distributed import BatchNormAverager
from mambavision.models.blocks import conv_batch_norm
from tests.unit.model_samples import micro

FINITE = torch.tensor(1.0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        nn.init.normal_(self.norm.running_mean), nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return conv_batch_norm(self.conv, self.norm, x, activation="relu")


def step(model: nn.Module, averager: BatchNormAverager, micro_batches: list[Tensor], norm: Tensor = FINITE) -> None:
    averager.begin_step()
    for index, images in enumerate(micro_batches):
        averager.begin_micro_batch(index)
        model(images).square().mean().backward()
    averager.finish_step(len(micro_batches), norm)


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_steps_statistics_are_the_mean_over_its_micro_batches(count: int, dtype: torch.dtype) -> None:
    layer = Layer()
    micro_batches = list(torch.randn(count, 4, 3, 9, 9) * torch.arange(1, count + 1).view(-1, 1, 1, 1, 1))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            seen = torch.stack([layer.conv(images).float() for images in micro_batches])  # (count, B, C, H, W)
        norm = copy.deepcopy(layer.norm)
        step(layer, BatchNormAverager(layer), micro_batches)
    mean, var = seen.mean((1, 3, 4)).mean(0), seen.transpose(1, 2).flatten(2).var(2).mean(0)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(layer.norm.running_mean, 0.9 * norm.running_mean + 0.1 * mean, **close)
    torch.testing.assert_close(layer.norm.running_var, 0.9 * norm.running_var + 0.1 * var, **close)
    assert layer.norm.num_batches_tracked == 1


def test_a_refused_step_of_many_micro_batches_leaves_the_statistics_bitwise_and_the_next_one_starts_afresh() -> None:
    layer, other = Layer(), Layer()
    averager, good = BatchNormAverager(layer), list(torch.randn(3, 4, 3, 9, 9))
    bad = [good[0], torch.full_like(good[0], torch.nan), good[1]]
    step(layer, averager, bad, torch.tensor(torch.nan))
    step(layer, averager, good)
    step(other, BatchNormAverager(other), good)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers()))


def test_the_end_of_a_step_does_not_wait_for_the_device() -> None:
    """On the meta device a value cannot be read at all."""
    layer = Layer().to("meta")
    averager = BatchNormAverager(layer)
    averager.begin_step()
    for index in range(2):
        averager.begin_micro_batch(index)
    averager.finish_step(2, torch.zeros((), device="meta"))


@pytest.mark.slow
def test_number_of_compiled_graphs_does_not_depend_on_the_number_of_micro_batches() -> None:
    """A layer's momentum is a number in the graph: were it another one in each micro-batch, each would be compiled."""
    from torch._dynamo.testing import CompileCounter

    graphs = {}
    for count in (2, 12):
        torch.compiler.reset()
        model, counter = micro(dim=8, depths=(1, 1, 2, 2)).train(), CompileCounter()
        model.compile(backend=counter)
        averager = BatchNormAverager(model)
        for _ in range(2):
            step(model, averager, list(torch.randn(count, 2, 3, 32, 32)))
        graphs[count] = counter.frame_count
    assert graphs[12] == graphs[2] == 1


def test_a_frozen_backbone_computes_in_training_what_it_does_in_evaluation() -> None:
    torch.manual_seed(0)
    model = create_model("mambavision_nano", num_classes=3, drop_path=0.5)
    images = torch.randn(4, 3, 32, 32)
    model.train()(images)  # so that the statistics are no identity
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(images)
    model.freeze_backbone()
    model.train()
    assert model.training and model.head.training and not model.norm.training
    logits = model(images)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not BatchNormAverager(model).buffers
