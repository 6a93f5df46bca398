"""The moving average: its arithmetic, what it leaves alone, and that a resumed one goes on bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mambavision.optim import ModelEma


class WithAllBuffers(nn.Module):
    """Float, integer and boolean buffers; one weight in channels-last."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(dtype=dtype, memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5).to(dtype)
        self.head = nn.Linear(5, 200).to(dtype)
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def train_a_little(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
            else:
                tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator))


def assert_same_tensors(left: nn.Module, right: nn.Module) -> None:
    left_state, right_state = left.state_dict(), right.state_dict()
    assert left_state.keys() == right_state.keys()
    for name in left_state:
        assert torch.equal(left_state[name], right_state[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # native and torch's kernels
@pytest.mark.parametrize("grad_norm", [None, 1.0])
def test_average_is_the_weighted_sum_of_all_values(dtype: torch.dtype, grad_norm: float | None):
    model = WithAllBuffers(dtype)
    ema = ModelEma(model, 0.9)
    expected = {name: t.double().clone() for name, t in model.state_dict().items()}
    for step in range(20):
        train_a_little(model, seed=step)
        ema.update(model, step, grad_norm=None if grad_norm is None else torch.tensor(grad_norm))
        expected = {name: 0.9 * expected[name] + 0.1 * t.double() for name, t in model.state_dict().items()}
    for name, average in ema.module.state_dict().items():
        if average.is_floating_point():
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(average, model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refused_step_leaves_the_average_alone_even_beside_nan(dtype: torch.dtype):
    model = WithAllBuffers(dtype)
    ema = ModelEma(model, 0.9)
    before = copy.deepcopy(ema.module)
    train_a_little(model, seed=0)
    with torch.no_grad():
        model.norm.running_mean.fill_(float("nan"))  # what a diverged forward pass leaves behind
    for norm in (float("nan"), float("inf")):
        ema.update(model, 0, grad_norm=torch.tensor(norm))
    assert_same_tensors(ema.module, before)


def test_resumed_average_goes_on_bit_for_bit(tmp_path):
    model = WithAllBuffers()
    ema = ModelEma(model, 0.99, warmup=True)
    for step in range(6):
        if step == 3:
            torch.save(ema.state_dict(), tmp_path / "ema.pt")
            resumed = ModelEma(WithAllBuffers(), 0.99, warmup=True)
            resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        train_a_little(model, seed=step)
        ema.update(model, step)
        if step >= 3:
            resumed.update(model, step)
    assert_same_tensors(resumed.module, ema.module)


def test_warm_up_follows_fast_at_first_and_ends_at_the_decay():
    ema = ModelEma(nn.Linear(1, 1), 0.9998, warmup=True)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(90) == pytest.approx(0.91)
    assert ema.decay_at(10**6) == 0.9998
    assert ModelEma(nn.Linear(1, 1), 0.9998).decay_at(0) == 0.9998


def test_module_is_a_teacher_and_shares_nothing_with_the_model():
    model = WithAllBuffers().train()
    ema = ModelEma(model, 0.9)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert pointers.isdisjoint(t.data_ptr() for t in ema.module.state_dict().values())
    assert not ema.module(torch.randn(2, 3, 8, 8)).requires_grad


def test_memory_format_of_model_and_average_may_differ():
    model = WithAllBuffers()
    ema = ModelEma(model, 0.5)
    old, plain = model.conv.weight.detach().clone(), WithAllBuffers()
    plain.conv.to(memory_format=torch.contiguous_format)
    ema.update(plain, 0)
    torch.testing.assert_close(ema.module.conv.weight, (old + plain.conv.weight.detach()) / 2)


def test_wrapped_model_is_refused_with_the_cure():
    model = nn.Linear(2, 2)
    ema = ModelEma(model, 0.9)
    with pytest.raises(ValueError, match="unwrapped model"):
        ema.update(nn.Sequential(model), 0)
    with pytest.raises(ValueError, match="must lie in"):
        ModelEma(model, 1.0)


def test_tensors_that_are_replaced_between_updates_are_followed():
    model = WithAllBuffers()
    ema = ModelEma(model, 0.0)  # becomes the model at each update
    ema.update(model, 0)
    model.norm.running_mean = torch.full((5,), 3.0)
    model.head.weight = nn.Parameter(torch.full((200, 5), 2.0))
    model.conv.weight.data = torch.ones_like(model.conv.weight)
    ema.update(model, 1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ema.module.state_dict()[name], tensor)


def test_a_copied_or_pickled_average_follows_the_model_it_is_given():
    model = WithAllBuffers()
    ema = ModelEma(model, 0.5)
    ema.update(model, 0)
    for other in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        train_a_little(model, seed=1)
        for step in range(1, 40):
            other.update(model, step)
        torch.testing.assert_close(other.module.head.weight, model.head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # native and torch's kernels
def test_a_buffer_that_is_a_slice_is_averaged_too(dtype: torch.dtype):
    model = nn.Linear(4, 3, dtype=dtype)
    model.register_buffer("slice", torch.zeros(3, 4, dtype=dtype)[:, ::2])
    ema = ModelEma(model, 0.5)
    model.slice.copy_(torch.arange(6, dtype=dtype).reshape(3, 2))
    ema.update(model, 0)
    torch.testing.assert_close(ema.module.slice, model.slice / 2)


def test_a_model_whose_head_was_replaced_is_refused_and_not_read_beyond_its_end():
    model = WithAllBuffers()
    ema = ModelEma(model, 0.9)
    model.head = nn.Linear(5, 7)
    with pytest.raises(ValueError, match="other names or shapes .* make a new ModelEma after a change of its layers"):
        ema.update(model, 0)
