"""The native GELU against PyTorch's: values, gradients, layouts, tails."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mambavision.ops.gelu import gelu
from mambavision.ops.native_build import load_native

pytestmark = pytest.mark.skipif(load_native() is None, reason="the native kernels cannot be built here")
FORMS = ("none", "tanh")


@pytest.mark.parametrize("approximate", FORMS)
def test_values_and_gradients_equal_float64_to_float32_rounding(approximate):
    x = torch.cat([torch.linspace(-14, 14, 20_001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1e4, -1e4])])
    direction = torch.randn_like(x)
    found, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = gelu(found, approximate=approximate), F.gelu(wanted, approximate=approximate)
    torch.testing.assert_close(y, expected.float(), rtol=3e-7, atol=1e-6)
    y.backward(direction)
    expected.backward(direction.double())
    torch.testing.assert_close(found.grad, wanted.grad.float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("approximate", FORMS)
def test_bfloat16_is_the_rounded_float32_result(approximate):
    x = torch.randn(3, 1001, dtype=torch.bfloat16, requires_grad=True)
    y = gelu(x, approximate=approximate)
    y.sum().backward()
    wanted = x.detach().double().requires_grad_()
    expected = F.gelu(wanted, approximate=approximate)
    expected.sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 15, 17, 33, 100_003])
def test_every_length_is_covered_to_its_last_element(size):
    x = torch.randn(size)
    torch.testing.assert_close(gelu(x), F.gelu(x.double()).float(), rtol=3e-7, atol=1e-6)


def test_layouts_survive_and_gradients_of_another_layout_are_matched():
    x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = gelu(x, approximate="tanh")
    assert y.is_contiguous(memory_format=torch.channels_last)
    direction = torch.randn(2, 5, 3, 4)
    (found,) = torch.autograd.grad(y, x, direction)
    (expected,) = torch.autograd.grad(F.gelu(x, approximate="tanh"), x, direction)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    sliced = torch.randn(4, 10)[:, ::2]
    torch.testing.assert_close(gelu(sliced), F.gelu(sliced), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("approximate", FORMS)
def test_a_nan_stays_one_and_infinity_passes(approximate):
    y = gelu(torch.tensor([float("nan"), float("inf")] * 20), approximate=approximate)
    assert y[::2].isnan().all() and y[1::2].isinf().all()


@pytest.mark.parametrize("approximate", FORMS)
def test_a_gradient_of_a_gradient_equals_float64(approximate):
    x = torch.randn(40, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    for point, function in ((x, gelu), (exact, F.gelu)):
        y = function(point, approximate=approximate)
        (first,) = torch.autograd.grad(y.square().sum(), point, create_graph=True)
        first.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_and_an_exported_graph_hold_pytorchs_operator():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return gelu(x)

    graph = torch.export.export(Layer(), (torch.randn(3),)).graph_module.code
    assert "torch.ops.aten.gelu" in graph and "mambavision" not in graph


def test_a_forward_mode_derivative_is_refused_and_not_zero():
    x = torch.randn(4)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward AD with mambavision::gelu_forward"),
    ):
        gelu(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_shapes_are_known_without_values():
    with FakeTensorMode():
        assert gelu(torch.empty(3, 4, dtype=torch.bfloat16)).shape == (3, 4)
