"""LAMB: timm's update to rounding, the same on every path, and untouched by a gradient that is not finite."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from mambavision.ops.native_build import load_native
from mambavision.optim import SGD, AdamW, Lamb, build_param_groups, clear_gradients, global_grad_norm
from mambavision.optim.lamb import lamb_multi_tensor, lamb_native

SHAPES = [(3,), (1,), (5, 7), (17,), (33, 129), (4, 3, 3, 3), (300, 200)]  # the last spans several native chunks


class Weights(nn.Module):
    """Parameters of odd shapes; the first matrix starts at norm zero, where the trust ratio is not defined."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(SHAPES):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{index}", nn.Parameter((value if index != 2 else 0 * value).to(dtype)))


def set_gradients(*models: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        scale = 10 ** (3 * torch.randn((), generator=generator, dtype=torch.float64))
        gradient = scale * torch.randn(parameters[0].shape, generator=generator, dtype=torch.float64)
        for parameter in parameters:
            parameter.grad = gradient.to(parameter.dtype)


def largest_relative_difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def assert_identical(left: object, right: object) -> None:
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_identical(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    else:
        assert left == right


@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_fifty_steps_equal_timm(dtype: torch.dtype, tolerance: float, max_grad_norm: float | None, weight_decay: float):
    ours, theirs = Weights(dtype), Weights(dtype)
    optimizer = Lamb(build_param_groups(ours, weight_decay), lr=5e-3, max_grad_norm=max_grad_norm)
    reference = timm.optim.Lamb(
        build_param_groups(theirs, weight_decay), lr=5e-3, eps=1e-8, max_grad_norm=max_grad_norm
    )
    for step in range(50):
        for group in [*optimizer.param_groups, *reference.param_groups]:
            group["lr"] = 5e-3 / (1 + step)
        set_gradients(ours, theirs, seed=step)
        optimizer.step(grad_norm=global_grad_norm(ours.parameters()))
        reference.step()
    assert largest_relative_difference(ours, theirs) < tolerance


def test_two_clips_in_one_division_equal_clipping_first():
    once, twice = Weights(torch.float64), Weights(torch.float64)
    folded, separate = (Lamb(build_param_groups(model, 0.05), max_grad_norm=None) for model in (once, twice))
    for step in range(5):
        set_gradients(once, twice, seed=step)
        folded.step(grad_norm=global_grad_norm(once.parameters()), clip=5.0)
        torch.nn.utils.clip_grad_norm_(twice.parameters(), 5.0)
        separate.step()
    assert largest_relative_difference(once, twice) < 1e-5  # torch adds 1e-6 to the norm it divides by


@pytest.mark.skipif(load_native() is None, reason="no C++ compiler: the native kernels are not built")
@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_native_step_equals_torchs_kernels(weight_decay: float):
    weights = [Weights(torch.float32), Weights(torch.float32)]
    moments = [[[torch.zeros_like(p) for p in model.parameters()] for _ in range(2)] for model in weights]
    for step in range(1, 11):
        set_gradients(*weights, seed=step)
        for update, model, (exp_avgs, exp_avg_sqs) in zip(
            (lamb_native, lamb_multi_tensor), weights, moments, strict=True
        ):
            parameters = list(model.parameters())
            with torch.no_grad():
                update(
                    parameters,
                    [p.grad for p in parameters],
                    exp_avgs,
                    exp_avg_sqs,
                    step=torch.tensor(float(step)),
                    divisor=torch.tensor(3.0),
                    refused=torch.tensor(0.0),
                    lr=5e-3,
                    betas=(0.9, 0.999),
                    eps=1e-8,
                    weight_decay=weight_decay,
                )
    assert largest_relative_difference(*weights) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(steps_before: int, bad: float, dtype: torch.dtype):
    model = Weights(dtype)
    optimizer = Lamb(build_param_groups(model, 0.05))
    for step in range(steps_before + 1):  # the first of them creates the moments
        set_gradients(model, seed=step)
        if step == 0 and steps_before == 0:
            model.p0.grad[0] = bad
        optimizer.step()
    before = snapshot(model, optimizer)
    set_gradients(model, seed=99)
    model.p4.grad[3, 5] = bad
    optimizer.step(grad_norm=global_grad_norm(model.parameters()), clip=5.0)
    assert_identical(snapshot(model, optimizer), before)
    assert optimizer.skipped_steps.item() == (2 if steps_before == 0 else 1)
    assert optimizer.param_groups[0]["step"].item() == (0 if steps_before == 0 else steps_before + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_optimizer_goes_on_bit_for_bit(dtype: torch.dtype, tmp_path):
    uninterrupted = Weights(dtype)
    optimizer = Lamb(build_param_groups(uninterrupted, 0.05))
    for step in range(8):
        if step == 4:
            torch.save(
                {"model": uninterrupted.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt"
            )
        set_gradients(uninterrupted, seed=step)
        optimizer.step()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Weights(dtype)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer = Lamb(build_param_groups(resumed, 0.05))
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for step in range(4, 8):
        set_gradients(resumed, seed=step)
        resumed_optimizer.step()
    assert_identical(snapshot(resumed, resumed_optimizer), snapshot(uninterrupted, optimizer))


def test_result_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    states = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            model = Weights(torch.float32)
            optimizer = Lamb(build_param_groups(model, 0.05))
            for step in range(3):
                set_gradients(model, seed=step)
                optimizer.step()
            states.append(snapshot(model, optimizer))
    finally:
        torch.set_num_threads(threads)
    assert_identical(states[1], states[0])
    assert_identical(states[2], states[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_format_of_weight_gradient_and_saved_moments_may_differ(dtype: torch.dtype):
    plain, mixed = (nn.Conv2d(8, 8, 3).to(dtype) for _ in range(2))
    mixed.to(memory_format=torch.channels_last)
    mixed.load_state_dict(plain.state_dict())
    optimizers = [Lamb(model.parameters(), weight_decay=0.05) for model in (plain, mixed)]
    for step in range(4):
        set_gradients(plain, mixed, seed=step)  # contiguous in both
        for optimizer in optimizers:
            optimizer.step()
        if step == 1:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert largest_relative_difference(mixed, plain) < 1e-6


def test_parameters_without_gradient_stay():
    model = Weights(torch.float32)
    optimizer = Lamb(build_param_groups(model, 0.05))
    set_gradients(model, seed=0)
    model.p4.grad = None
    before = model.p4.detach().clone()
    optimizer.step()
    assert torch.equal(model.p4, before)
    assert not torch.equal(model.p6, Weights(torch.float32).p6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"lr": -1.0}, "lr -1.0"), ({"betas": (0.9, 1.0)}, r"\[0, 1\)"), ({"max_grad_norm": 0.0}, "None switches")],
)
def test_values_out_of_range_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.zeros(2))], **arguments)


def test_gradient_norm_equals_torchs_and_wants_a_gradient():
    model = Weights(torch.float32)
    with pytest.raises(RuntimeError, match="backward"):
        global_grad_norm(model.parameters())
    set_gradients(model, seed=0)
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert global_grad_norm(model.parameters()).item() == pytest.approx(flat.norm().item(), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("optimizer", [Lamb, partial(AdamW, fused=True), partial(SGD, fused=True)])
def test_weights_in_half_precision_are_clipped_by_a_norm_in_full_precision(optimizer, dtype, tolerance):
    half, full = Weights(dtype), Weights(torch.float64)
    full.load_state_dict(half.state_dict())
    before = copy.deepcopy(full)
    steps = [optimizer(build_param_groups(weights, 0.0), lr=0.05) for weights in (half, full)]
    for ours, exact in zip(half.parameters(), full.parameters(), strict=True):
        ours.grad = (300.0 + 100.0 * torch.randn(ours.shape)).to(dtype)  # their norm is beyond what float16 holds
        exact.grad = ours.grad.double()
    wanted = global_grad_norm(full.parameters())
    found = global_grad_norm(half.parameters())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=0)
    for step in steps:
        step.step(clip=5.0)
    for ours, exact, start in zip(half.parameters(), full.parameters(), before.parameters(), strict=True):
        assert ours.dtype == dtype and not torch.equal(exact, start)
        torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance)


def test_shards_are_refused_in_words():
    class Shard(Tensor):
        def to_local(self) -> Tensor: ...

    with pytest.raises(ValueError, match=r"group 'decay' holds shards of tensors \(FSDP\).* use DDP, or AdamW"):
        Lamb([{"name": "decay", "params": [torch.randn(3).as_subclass(Shard)]}])


def test_gradients_are_cleared_where_they_lie_or_given_up():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    used.square().sum().backward()
    place = used.grad.data_ptr()
    clear_gradients([used, unused], keep_memory=True)
    assert used.grad.data_ptr() == place and not used.grad.any() and unused.grad is None
    clear_gradients([used, unused], keep_memory=False)
    assert used.grad is None
