"""The token convolution: equal to nn.Conv1d plus SiLU, in value and gradient, on whatever path serves the tensor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.depthwise_conv import conv_silu_split, conv_silu_tokens, conv_tokens_reference
from mambavision.ops.native_build import load_native

needs_native = pytest.mark.skipif(load_native() is None, reason="no C++ compiler: the native kernels are not built")
# Odd widths leave part of a vector empty; 600 tokens are cut into tiles; 70 sequences share partial sums.
SHAPES = [(2, 5, 3), (1, 1, 17), (3, 49, 40), (2, 600, 33), (70, 2, 64)]
# Without the kernels products and sums are rounded too.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if load_native() else 1e-2}


def oracle(x: Tensor, weight: Tensor, causal: bool, silu: bool) -> Tensor:
    padded = F.pad(x.double().transpose(1, 2), (2, 0) if causal else (1, 1))
    y = F.conv1d(padded, weight.double(), groups=weight.shape[0]).transpose(1, 2)
    return F.silu(y) if silu else y


def slice_of_projection(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Channels contiguous, tokens further apart than their channels."""
    torch.manual_seed(channels)
    return torch.randn(batch, tokens, channels + 5).to(dtype)[..., 2 : 2 + channels].detach().requires_grad_()


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "silu"), [(False, True), (True, True), (False, False), (True, False)])
def test_value_and_gradients_equal_conv1d_in_float64(shape, dtype: torch.dtype, causal: bool, silu: bool):
    x = slice_of_projection(*shape, dtype)
    weight = torch.randn(shape[2], 1, 3, requires_grad=True)
    y = conv_silu_tokens(x, weight, causal=causal, silu=silu)
    assert y.dtype == dtype and y.is_contiguous()
    dy = torch.randn_like(y)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = oracle(exact_x, exact_weight, causal, silu)
    gradients = torch.autograd.grad(y, (x, weight), dy)
    expected_gradients = torch.autograd.grad(expected, (exact_x, exact_weight), dy.double())
    for got, wanted in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_branches_in_one_call_equal_two_calls(dtype: torch.dtype):
    xz = torch.randn(3, 49, 40).to(dtype).requires_grad_()
    weight_x, weight_z = (torch.randn(channels, 1, 3, requires_grad=True) for channels in (24, 16))
    together = conv_silu_split(xz, weight_x, weight_z)
    apart = conv_silu_tokens(xz[..., :24], weight_x), conv_silu_tokens(xz[..., 24:], weight_z)
    dys = [torch.randn_like(y) for y in together]
    for got, wanted in zip(together, apart, strict=True):
        assert torch.equal(got, wanted)
    leaves = (xz, weight_x, weight_z)
    for got, wanted in zip(
        torch.autograd.grad(together, leaves, dys), torch.autograd.grad(apart, leaves, dys), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("causal", "silu"), [(False, True), (True, False)])
def test_plain_formulation_equals_conv1d(causal: bool, silu: bool):
    x, weight = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(6, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(conv_tokens_reference(x, weight, causal, silu), oracle(x, weight, causal, silu))
    torch.testing.assert_close(conv_silu_tokens(x, weight, causal=causal, silu=silu), oracle(x, weight, causal, silu))


@needs_native
def test_gradients_are_bitwise_the_same_at_any_number_of_threads():
    x = slice_of_projection(5, 300, 40, torch.float32)
    weight = torch.randn(40, 1, 3, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            y = conv_silu_tokens(x, weight)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
def test_not_a_number_comes_through_only_where_it_reaches():
    x = torch.randn(1, 6, 20)
    x[0, 3, 7] = float("nan")
    bad = conv_silu_tokens(x, torch.ones(20, 1, 3)).isnan()
    assert bad.nonzero().tolist() == [[0, 2, 7], [0, 3, 7], [0, 4, 7]]


@needs_native
def test_autocast_tokens_stay_bfloat16_and_weights_float32():
    linear = torch.nn.Linear(8, 12)
    weight = torch.randn(12, 1, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_silu_tokens(linear(torch.randn(2, 5, 8)), weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and linear.weight.grad.dtype == torch.float32


@needs_native
@pytest.mark.slow
def test_operator_obeys_torchs_rules():
    x = torch.randn(2, 9, 12, requires_grad=True)
    weights = [torch.randn(5, 1, 3, requires_grad=True), torch.randn(7, 1, 3, requires_grad=True)]
    conv_silu_split(x, *weights)  # registers the shapes
    torch.library.opcheck(torch.ops.mambavision.token_conv.default, (x, weights, False, True))


@pytest.mark.slow
@needs_native
def test_compiles_whole_and_exports():
    x = torch.randn(2, 9, 12, requires_grad=True)
    weights = torch.randn(5, 1, 3, requires_grad=True), torch.randn(7, 1, 3, requires_grad=True)

    def loss(x: Tensor, weight_x: Tensor, weight_z: Tensor) -> Tensor:
        left, right = conv_silu_split(x, weight_x, weight_z)
        return left.square().sum() + right.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, *weights), (x, *weights))
    for got, wanted in zip(torch.autograd.grad(compiled(x, *weights), (x, *weights)), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@needs_native
@pytest.mark.parametrize(("causal", "silu"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_equal_float64(causal: bool, silu: bool, frozen: bool):
    x, weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(3, 1, 3, requires_grad=not frozen)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight)]
    for y, inputs in (
        (conv_silu_tokens(x, weight, causal=causal, silu=silu), [x, weight]),
        (oracle(*exact, causal, silu), exact),
    ):
        leaves = [t for t in inputs if t.requires_grad]
        gradients = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    for found, expected in zip((x, weight), exact, strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_of_this_machine_agrees(isa: str):
    program = """
import torch
from mambavision.ops.depthwise_conv import conv_silu_tokens, conv_tokens_reference
torch.manual_seed(0)
x, w = torch.randn(3, 37, 41, requires_grad=True), torch.randn(41, 1, 3, requires_grad=True)
got, wanted = conv_silu_tokens(x, w), conv_tokens_reference(x, w, False, True)
torch.testing.assert_close(got, wanted)
for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, wanted))):
    torch.testing.assert_close(a, b)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "MAMBAVISION_ISA": isa}, capture_output=True, text=True
    )
    if "this processor only has" in answer.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert answer.returncode == 0, answer.stderr


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x \(2, 5, 4\) and weights \(3, 1, 3\)"):
        conv_silu_tokens(torch.randn(2, 5, 4), torch.randn(3, 1, 3))
    with pytest.raises(ValueError, match=r"\(4, 1, 5\)"):
        conv_silu_tokens(torch.randn(2, 5, 4), torch.randn(4, 1, 5))
