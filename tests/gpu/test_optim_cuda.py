"""LAMB, the moving average and the gradient norm on MambaVision-T's own parameters on a CUDA device."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from mambavision import create_model
from mambavision.optim import Lamb, ModelEma, build_param_groups, global_grad_norm
from mambavision.optim.lamb import lamb_multi_tensor
from mambavision.optim.native import triton_kernels

triton_lists = pytest.importorskip("mambavision.optim.triton_lists", reason="these kernels need the triton package")


@pytest.fixture(scope="module")
def initial() -> nn.Module:
    torch.manual_seed(0)
    return create_model("mambavision_t")


@pytest.fixture
def model(initial: nn.Module, cuda: torch.device) -> nn.Module:
    return copy.deepcopy(initial).to(cuda, memory_format=torch.channels_last)


def set_gradients(model: nn.Module, seed: int) -> None:
    """In the parameters' memory format, of very different sizes; where gradients are, they stay in place."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        gradient = 10 ** (2 * torch.randn((), device=parameter.device)) * torch.randn_like(parameter)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


def lamb_of(model: nn.Module) -> Lamb:
    return Lamb(build_param_groups(model, 0.05), lr=5e-3)


def take_steps(model: nn.Module, optimizer: Lamb, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step(grad_norm=global_grad_norm(model.parameters()), clip=5.0)


def state_of(model: nn.Module, optimizer: Lamb) -> list[Tensor]:
    moments = [m for p in model.parameters() for m in (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    return [t.detach().clone() for t in (*model.parameters(), *moments, *(g["step"] for g in optimizer.param_groups))]


def assert_identical(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_who_takes_which_tensors(model: nn.Module):
    parameters = list(model.parameters())
    assert triton_kernels(parameters) is triton_lists
    assert triton_kernels([p.half() for p in parameters[:3]]) is None
    assert triton_kernels([p.double() for p in parameters[:3]]) is None
    assert triton_kernels([p.cpu() for p in parameters[:3]]) is None
    assert triton_kernels([parameters[0], parameters[1].cpu()]) is None
    assert triton_kernels([torch.zeros(4, 6, device=parameters[0].device)[:, ::2]]) is None


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_lamb_equals_torchs_kernels_in_float64(model: nn.Module, cuda: torch.device, weight_decay: float):
    ours = [p.detach() for p in model.parameters()]
    ours[3].zero_()  # a trust ratio of 1
    exact = [p.double() for p in ours]
    moments, exact_moments = ([[torch.zeros_like(p) for p in ps] for _ in range(2)] for ps in (ours, exact))
    for step in range(1, 5):
        set_gradients(model, seed=step)
        grads = [p.grad for p in model.parameters()]
        settings = {
            "step": torch.tensor(float(step), device=cuda),
            "refused": torch.zeros((), device=cuda),
            "lr": 5e-3 / step,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": weight_decay,
        }
        divisor = torch.tensor(3.0, device=cuda)
        triton_lists.lamb_triton(ours, grads, *moments, divisor=divisor, **settings)
        doubled = [g.double() for g in grads]
        lamb_multi_tensor(exact, doubled, *exact_moments, divisor=divisor.double(), **settings)
    pairs = zip((*ours, *moments[0], *moments[1]), (*exact, *exact_moments[0], *exact_moments[1]), strict=True)
    assert max(((a - b).norm() / b.norm()).item() for a, b in pairs) < 2e-6


def test_steps_are_bitwise_repeatable(model: nn.Module):
    other = copy.deepcopy(model)
    optimizers = lamb_of(model), lamb_of(other)
    for each, optimizer in zip((model, other), optimizers, strict=True):
        take_steps(each, optimizer, range(4))
    assert_identical(state_of(model, optimizers[0]), state_of(other, optimizers[1]))


def test_gradients_in_another_memory_format_or_at_another_place_give_the_same(model: nn.Module):
    other = copy.deepcopy(model)
    optimizers = lamb_of(model), lamb_of(other)
    for seed in range(3):
        take_steps(model, optimizers[0], range(seed, seed + 1))
        other.zero_grad(set_to_none=True)
        set_gradients(other, seed)
        kept = []
        for parameter in other.parameters():  # views 4 bytes off any alignment, as DDP's buckets may give
            bucket = torch.empty(parameter.numel() + 1, device=parameter.device)
            kept.append(bucket)
            view = bucket[1:].view(parameter.shape)  # contiguous, whatever the parameter is
            parameter.grad = view.copy_(parameter.grad)
        optimizers[1].step(grad_norm=global_grad_norm(model.parameters()), clip=5.0)
    assert_identical(state_of(model, optimizers[0]), state_of(other, optimizers[1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(model: nn.Module, bad: float):
    optimizer, ema = lamb_of(model), ModelEma(model, 0.9)
    take_steps(model, optimizer, range(2))
    before, average = state_of(model, optimizer), [t.clone() for t in ema.module.state_dict().values()]
    set_gradients(model, seed=9)
    next(model.parameters()).grad[0, 0, 1, 2] = bad
    norm = global_grad_norm(model.parameters())
    optimizer.step(grad_norm=norm, clip=5.0)
    ema.update(model, 0, grad_norm=norm)
    assert_identical(state_of(model, optimizer), before)
    assert_identical(list(ema.module.state_dict().values()), average)
    assert optimizer.skipped_steps.item() == 1


def test_the_norm_equals_float64s(model: nn.Module):
    set_gradients(model, seed=0)
    grads = [p.grad for p in model.parameters()]
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    found = global_grad_norm(model.parameters())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(global_grad_norm(model.parameters()), found)
    assert triton_lists.norm_triton([torch.full((5000,), 1e20, device=found.device)]).isinf()


def test_the_average_equals_float64s(model: nn.Module):
    ema, optimizer = ModelEma(model, 0.9), lamb_of(model)
    exact = {name: t.double() for name, t in ema.module.state_dict().items() if t.is_floating_point()}
    for seed in range(3):
        take_steps(model, optimizer, range(seed, seed + 1))
        norm = torch.ones((), device=optimizer.skipped_steps.device)
        ema.update(model, seed, grad_norm=norm if seed % 2 else None)
        exact = {name: 0.9 * t + 0.1 * model.state_dict()[name].double() for name, t in exact.items()}
    for name, average in exact.items():
        torch.testing.assert_close(ema.module.state_dict()[name].double(), average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("set_to_none", [False, True])  # True: gradients lie elsewhere in each step
def test_a_step_does_not_wait_for_the_device(model: nn.Module, no_host_sync, set_to_none: bool):
    optimizer, ema = lamb_of(model), ModelEma(model, 0.9)
    kept = []

    def step() -> None:
        for parameter in model.parameters():
            if set_to_none:
                kept.append(parameter.grad)  # so that the next one cannot come to lie in its place
                parameter.grad = torch.ones_like(parameter)
        norm = global_grad_norm(model.parameters())
        optimizer.step(grad_norm=norm, clip=5.0)
        ema.update(model, 0, grad_norm=norm)

    set_gradients(model, seed=0)
    step()  # compiles, and makes the moments
    with no_host_sync:
        for lr in (1e-3, 2e-3):
            for group in optimizer.param_groups:
                group["lr"] = lr
            step()


def test_a_captured_step_equals_an_ordinary_one(model: nn.Module):
    other = copy.deepcopy(model)
    optimizers = lamb_of(model), lamb_of(other)

    def step(each: nn.Module, optimizer: Lamb) -> None:
        optimizer.step(grad_norm=global_grad_norm(each.parameters()), clip=5.0)

    set_gradients(model, seed=0)
    set_gradients(other, seed=0)
    step(model, optimizers[0])
    step(other, optimizers[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(other, optimizers[1])
    for seed in range(1, 4):
        set_gradients(model, seed)
        set_gradients(other, seed)
        step(model, optimizers[0])
        graph.replay()
    assert_identical(state_of(model, optimizers[0]), state_of(other, optimizers[1]))


def test_a_graph_around_gradients_that_are_not_known_is_refused_in_words(model: nn.Module):
    optimizer = lamb_of(model)
    take_steps(model, optimizer, range(1))
    gradients = [torch.ones_like(p) for p in model.parameters()]
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"take a step with the same gradients before"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            global_grad_norm(model.parameters())
