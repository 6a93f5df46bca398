"""The native operators of a bfloat16 training step: values and gradients against float64, repeatability, when they step in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops import training
from mambavision.ops.native_build import load_native

pytestmark = pytest.mark.skipif(load_native() is None, reason="no C++ compiler here: no compiled kernels")
needs_matrix_units = pytest.mark.skipif(training._with_matrix_units() is None, reason="no bfloat16 matrix units here")

ROUNDING = 2.0**-8  # relative error of a bfloat16, twice; results and their inputs are rounded to it


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def difference(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def rounded_linear(inner: int, outer: int) -> nn.Linear:
    """Float32 weights that bfloat16 holds exactly, so that only activations are rounded."""
    layer = nn.Linear(inner, outer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    return layer


@needs_matrix_units
@pytest.mark.parametrize(
    ("batch", "tokens", "inner", "outer", "bias"),
    [
        (3, 49, 64, 96, True),
        (2, 7, 20, 36, False),
        (1, 1, 320, 34, True),
        (2, 1500, 48, 130, True),
        (1, 33, 1088, 48, True),
        (1, 33, 700, 10, False),
    ],
)
def test_linear_equals_float64(batch: int, tokens: int, inner: int, outer: int, bias: bool) -> None:
    x, layer = bfloat16(batch, tokens, inner), rounded_linear(inner, outer)
    gradient = torch.randn(batch, tokens, outer).bfloat16()
    y = training.product(x, layer.weight, layer.bias if bias else None)
    y.backward(gradient)
    x64, w64, b64 = doubles(x, layer.weight, layer.bias)
    y64 = F.linear(x64, w64, b64 if bias else None)
    y64.backward(gradient.double())
    assert y.dtype == torch.bfloat16 and difference(y.detach(), y64.detach()) < ROUNDING
    assert difference(x.grad, x64.grad) < ROUNDING
    assert layer.weight.grad.dtype == torch.float32 and difference(layer.weight.grad, w64.grad) < 1e-5
    if bias:
        assert difference(layer.bias.grad, b64.grad) < 1e-5


@needs_matrix_units
def test_linear_reads_slices_in_place() -> None:
    whole, layer = bfloat16(2, 9, 64), rounded_linear(20, 16)
    part = training.product(whole[..., 4:24], layer.weight)
    assert torch.equal(part, training.product(whole[..., 4:24].contiguous(), layer.weight))


@needs_matrix_units
def test_mlp_equals_float64() -> None:
    x, first, second = bfloat16(4, 49, 48), rounded_linear(48, 192), rounded_linear(192, 48)
    gradient = torch.randn(4, 49, 48).bfloat16()
    y = training.mlp(x, first, second)
    y.backward(gradient)
    inputs = doubles(x, first.weight, first.bias, second.weight, second.bias)
    y64 = F.linear(F.gelu(F.linear(inputs[0], inputs[1], inputs[2])), inputs[3], inputs[4])
    y64.backward(gradient.double())
    assert difference(y.detach(), y64.detach()) < 2 * ROUNDING
    got = (x.grad, first.weight.grad, first.bias.grad, second.weight.grad, second.bias.grad)
    for ours, wanted in zip(got, inputs, strict=True):
        assert difference(ours, wanted.grad) < 2 * ROUNDING


@needs_matrix_units
@pytest.mark.parametrize(("tokens", "heads", "width"), [(49, 4, 40), (31, 3, 12), (196, 2, 32), (1, 1, 16)])
def test_attention_equals_float64(tokens: int, heads: int, width: int) -> None:
    qkv, dim = bfloat16(2, tokens, 3 * heads * width), heads * width
    gradient = torch.randn(2, tokens, dim).bfloat16()
    y = training.attention(qkv, heads)
    y.backward(gradient)
    (qkv64,) = doubles(qkv)
    q, k, v = qkv64.view(2, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    y64 = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, tokens, dim)
    y64.backward(gradient.double())
    assert difference(y.detach(), y64.detach()) < 2 * ROUNDING
    for ours, wanted in zip(qkv.grad.split(dim, -1), qkv64.grad.split(dim, -1), strict=True):
        assert difference(ours, wanted) < 2 * ROUNDING


@needs_matrix_units
def test_long_windows_are_left_to_pytorch() -> None:
    assert training.attention(bfloat16(1, 1024, 96), 1) is None


@pytest.mark.parametrize("activation", ["none", "relu", "gelu_tanh"])
@pytest.mark.parametrize(("batch", "channels", "side"), [(4, 80, 9), (1, 20, 3)])
def test_batch_norm_equals_float64(activation: str, batch: int, channels: int, side: int) -> None:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    x = (torch.randn(batch, channels, side, side) * 2 + 5).bfloat16().requires_grad_()
    gradient = torch.randn(batch, channels, side, side).bfloat16()
    x64, w64, b64 = doubles(x, norm.weight, norm.bias)
    mean64, var64 = norm.running_mean.double(), norm.running_var.double()
    y = training.batch_norm(x, norm, norm.bias, activation=activation)
    y.backward(gradient)
    y64 = F.batch_norm(x64, mean64, var64, w64, b64, training=True)
    y64 = {"none": lambda z: z, "relu": F.relu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}[activation](y64)
    y64.backward(gradient.double())
    assert difference(y.detach(), y64.detach()) < ROUNDING and difference(x.grad, x64.grad) < ROUNDING
    assert difference(norm.weight.grad, w64.grad) < 1e-3 and difference(norm.bias.grad, b64.grad) < 1e-3
    assert difference(norm.running_mean, mean64) < 1e-6 and difference(norm.running_var, var64) < 1e-6


def test_batch_norm_far_from_zero_keeps_its_variance() -> None:
    norm = nn.BatchNorm2d(8)
    x = (torch.randn(4, 8, 16, 16) + 100).bfloat16()
    norm64 = nn.BatchNorm2d(8).double()
    training.batch_norm(x.requires_grad_(), norm, norm.bias)
    norm64(x.detach().double())
    assert difference(norm.running_var, norm64.running_var) < 1e-4


def test_batch_norm_adds_a_kept_or_dropped_branch() -> None:
    norm, x, residual = nn.BatchNorm2d(24), bfloat16(3, 24, 5, 5), bfloat16(3, 24, 5, 5)
    scale, gradient = torch.tensor([0.0, 2.0, 1.0]), torch.randn(3, 24, 5, 5).bfloat16()
    y = training.batch_norm(x, norm, norm.bias, residual=residual, drop_path_scale=scale)
    y.backward(gradient)
    x64, r64 = doubles(x, residual)
    y64 = r64 + scale.double().view(3, 1, 1, 1) * F.batch_norm(x64, None, None, training=True)
    y64.backward(gradient.double())
    assert difference(y.detach(), y64.detach()) < ROUNDING and difference(x.grad, x64.grad) < ROUNDING
    assert torch.equal(residual.grad, gradient) and torch.equal(y[0], residual[0])


@pytest.mark.parametrize("scale", [None, torch.tensor([0.0, 1.5, 1.0])])
def test_layer_norm_with_its_residual_sum_equals_float64(scale: Tensor | None) -> None:
    norm, x, branch = nn.LayerNorm(72), bfloat16(3, 11, 72), bfloat16(3, 11, 72)
    gradients = [torch.randn(3, 11, 72).bfloat16() for _ in range(2)]
    results = training.add_layer_norm(x, branch, norm, scale)
    torch.autograd.backward(results, gradients)
    x64, branch64, w64, b64 = doubles(x, branch, norm.weight, norm.bias)
    sum64 = x64 + branch64 * (1.0 if scale is None else scale.double().view(3, 1, 1))
    y64 = F.layer_norm(sum64, (72,), w64, b64)
    torch.autograd.backward([sum64, y64], [gradient.double() for gradient in gradients])
    for got, wanted in zip(results, (sum64, y64), strict=True):
        assert difference(got.detach(), wanted.detach()) < ROUNDING
    for got, wanted in zip((x, branch, norm.weight, norm.bias), (x64, branch64, w64, b64), strict=True):
        assert difference(got.grad, wanted.grad) < ROUNDING


def test_layer_norm_without_a_branch_passes_its_input_on() -> None:
    norm, x = nn.LayerNorm(32), bfloat16(2, 5, 32)
    total, y = training.add_layer_norm(x, None, norm)
    assert torch.equal(total, x)
    (total.float().sum() + y.float().square().sum()).backward()
    (x64,) = doubles(x)
    (x64.sum() + F.layer_norm(x64, (32,)).square().sum()).backward()
    assert (x.grad.double() - x64.grad).abs().max() < 0.05


def through_norms(x: Tensor, branch: Tensor) -> tuple[list[nn.Module], list[Tensor], Tensor]:
    norm, batch_norm, image = nn.LayerNorm(64), nn.BatchNorm2d(64), bfloat16(8, 64, 28, 28)
    total, y = training.add_layer_norm(x, branch, norm, torch.rand(32))
    z = training.batch_norm(image, batch_norm, batch_norm.bias, activation="gelu_tanh")
    loss = total.float().square().mean() + z.float().pow(3).mean()
    return [norm, batch_norm], [x, image, y], loss


def norms_step() -> list[Tensor]:
    x, branch = bfloat16(32, 98, 64), bfloat16(32, 98, 64)
    layers, (x, image, y), loss = through_norms(x, branch)
    (loss + y.float().square().mean()).backward()
    return [x.grad, branch.grad, image.grad, *(p.grad for layer in layers for p in layer.parameters())]


def products_step() -> list[Tensor]:
    x, first, second, projection = bfloat16(32, 98, 64), nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 192)
    layers, (x, image, y), loss = through_norms(x, training.mlp(x, first, second))
    y = training.attention(training.product(y, projection.weight, projection.bias), 2)
    (loss + y.float().square().mean()).backward()
    layers += [first, second, projection]
    return [x.grad, image.grad, *(p.grad for layer in layers for p in layer.parameters())]


@pytest.mark.parametrize("step", [norms_step, pytest.param(products_step, marks=needs_matrix_units)])
def test_gradients_do_not_depend_on_the_number_of_threads(step: Callable[[], list[Tensor]]) -> None:
    threads = torch.get_num_threads()
    gradients = []
    try:
        for count in (1, 3):
            torch.manual_seed(1)
            torch.set_num_threads(count)
            gradients.append(step())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_norms_of_float32_inference_and_other_autocasts_are_left_to_pytorch() -> None:
    norm, x = nn.BatchNorm2d(8), bfloat16(2, 8, 3, 3)
    assert training.fuses_batch_norm(x, norm) and not training.fuses_batch_norm(x.float(), norm)
    with torch.no_grad():
        assert not training.fuses_batch_norm(x, norm)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not training.fuses_batch_norm(x, norm)


@needs_matrix_units
def test_float32_inference_and_other_autocasts_are_left_to_pytorch() -> None:
    qkv = torch.randn(2, 4, 24)
    assert training.attention(qkv, 1) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert training.attention(qkv, 1) is not None
        with torch.no_grad():
            assert training.attention(qkv, 1) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert training.attention(qkv, 1) is None


@needs_matrix_units
def test_double_backward_is_refused() -> None:
    x, layer = bfloat16(1, 4, 8), nn.Linear(8, 8)
    (gradient,) = torch.autograd.grad(
        training.product(x, layer.weight, layer.bias).float().square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.float().sum().backward()
