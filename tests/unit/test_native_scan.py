"""The compiled CPU scan against the plain recurrence in float64: values, gradients, tails, extremes, repeatability."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from mambavision.ops.cpu_scan import scan_cpu
from mambavision.ops.native_build import load_native
from mambavision.ops.reference import scan_reference

pytestmark = pytest.mark.skipif(load_native() is None, reason="no C++ compiler here: the compiled scan cannot be built")

NAMES = ("y", "u", "delta", "A", "B", "C", "D", "delta_bias")
SHAPES = [  # batch, tokens, channels, states
    (2, 49, 48, 8),
    (1, 37, 41, 8),  # no multiple of a tile of tokens or a vector of channels
    (3, 1, 5, 3),
    (1, 33, 70, 16),
    (40, 17, 20, 5),  # so many sequences that the backward does not split channels
]


def scan_inputs(
    batch: int, tokens: int, channels: int, states: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias as a trained mixer has them: dt from 0.001 to 0.1, A near -1..-n."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, states + 1).repeat(channels, 1) * (1 + 0.1 * normal(channels, states)).abs()
    dt = torch.exp(torch.rand(channels, generator=generator) * 4.6 - 6.9)
    bias = dt + torch.log(-torch.expm1(-dt))
    u, delta = normal(batch, tokens, channels), 0.5 * normal(batch, tokens, channels)
    B, C = normal(batch, tokens, states), normal(batch, tokens, states)
    return [u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), 1 + 0.1 * normal(channels), bias]


def value_and_gradients(scan, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = scan(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # exact in every dtype here
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", script], env=merged, capture_output=True, text=True, check=False)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item() if exact.any() else 0.0


def errors_of(inputs: list[Tensor]) -> dict[str, float]:
    exact = value_and_gradients(scan_reference, [tensor.double() for tensor in inputs])
    results = value_and_gradients(scan_cpu, inputs)
    return {name: relative_error(*pair) for name, *pair in zip(NAMES, results, exact)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_every_gradient_equal_float64(shape):
    errors = errors_of(scan_inputs(*shape))
    assert max(errors.values()) < 3e-6, errors


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_bfloat16_inputs_lose_only_the_rounding_of_the_outputs(shape):
    inputs = scan_inputs(*shape, dtype=torch.bfloat16)
    errors = errors_of(inputs)
    assert max(errors[name] for name in ("A", "D", "delta_bias")) < 3e-6, errors
    assert max(errors.values()) < 4e-3, errors
    assert scan_cpu(*inputs).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_gradients(isa):
    if isa == "avx2" and torch.ops.mambavision.native_isa() == "baseline":
        pytest.skip("this processor has no AVX2")
    script = (
        "import torch; from tests.unit import test_native_scan as t; "
        f"assert torch.ops.mambavision.native_isa() == {isa!r}; "
        "print(max(max(t.errors_of(t.scan_inputs(*shape)).values()) for shape in t.SHAPES))"
    )
    environment = {**os.environ, "MAMBAVISION_ISA": isa}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) < 3e-6


@pytest.mark.slow
def test_unknown_instruction_set_is_refused_with_the_choices():
    script = "from mambavision.ops.native_build import load_native; load_native().native_isa()"
    environment = {**os.environ, "MAMBAVISION_ISA": "avx1024"}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "MAMBAVISION_ISA=avx1024 is unknown; use baseline, avx2, avx512 or avx512bf16" in answer.stderr


def test_slices_of_a_projection_need_no_copy_and_give_the_same():
    u, delta, A, B, C, D, bias = scan_inputs(2, 21, 24, 8)
    packed = torch.cat([u, delta, B, C], dim=-1)
    sliced = packed.split([24, 24, 8, 8], dim=-1)
    assert not sliced[0].is_contiguous()
    y = scan_cpu(sliced[0], sliced[1], A, sliced[2], sliced[3], D, bias)
    assert torch.equal(y, scan_cpu(u, delta, A, B, C, D, bias))


def test_a_broadcast_output_gradient_is_accepted():
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(2, 20, 20, 8)]
    from_sum = torch.autograd.grad(scan_cpu(*leaves).sum(), leaves)
    y = scan_cpu(*leaves)
    from_ones = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(from_sum, from_ones))


def test_D_and_bias_may_be_left_out():
    inputs = [*scan_inputs(2, 20, 20, 8)[:5], None, None]
    exact = scan_reference(*(None if tensor is None else tensor.double() for tensor in inputs))
    assert relative_error(scan_cpu(*inputs), exact) < 1e-6


@pytest.mark.parametrize(
    ("name", "value"), [("delta", 60.0), ("delta", -60.0), ("delta", 500.0), ("A", -1e4), ("A", 0.0)], ids=str
)
def test_extreme_decays_stay_exact(name, value):
    inputs = scan_inputs(1, 20, 16, 8)
    inputs[NAMES.index(name) - 1].fill_(value)
    errors = errors_of(inputs)
    assert max(errors.values()) < 1e-5, errors  # exp(-60) in float32: its exponent alone is uncertain by 4e-6


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_a_nan_reaches_exactly_the_outputs_it_must(name):
    inputs = scan_inputs(1, 20, 20, 8)
    inputs[NAMES.index(name) - 1].select(-2, 3)[..., 1] = float("nan")
    expected = scan_reference(*(tensor.double() for tensor in inputs)).isnan()
    assert expected.any()
    assert torch.equal(scan_cpu(*inputs).isnan(), expected)


def test_bitwise_repeatable_at_any_number_of_threads():
    inputs = scan_inputs(3, 40, 96, 8)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(value_and_gradients(scan_cpu, inputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


@pytest.mark.parametrize("batch", [1, 8], ids=["one sequence", "many sequences"])
def test_two_threads_really_share_the_work(batch):
    """Compiled without OpenMP, the parallel loops of torch run serially and say nothing."""
    assert worker_cpu_seconds(batch) > 0.2


def worker_cpu_seconds(batch: int) -> float:
    """CPU time of all threads over that of the calling one, minus 1, while two threads scan forward and backward."""
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(batch, 392, 256, 8)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        scan_cpu(*inputs).sum().backward()
        torch.set_num_threads(2)
        process, thread = time.process_time(), time.thread_time()
        for _ in range(20):
            scan_cpu(*inputs).sum().backward()
        return (time.process_time() - process) / (time.thread_time() - thread) - 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_long_sequence_needs_less_than_three_times_its_inputs_and_outputs():
    """Detection has 12 544 tokens of 160 channels: peak resident memory of forward and backward in a fresh process."""
    script = """
import resource, torch
from mambavision.ops.cpu_scan import scan_cpu
from tests.unit.test_native_scan import scan_inputs
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(tokens):
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(1, tokens, 160, 8)]
    y = scan_cpu(*leaves)
    y.backward(torch.ones_like(y))
    return sum(tensor.numel() * 4 for tensor in (*leaves, y))
run(64)
before = peak()
bytes_in_and_out = run(12544)
print((peak() - before) / bytes_in_and_out)
"""
    answer = run_python(script)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) < 3


def test_wrong_shapes_and_dtypes_are_refused_with_what_was_wanted():
    u, delta, A, B, C, D, bias = scan_inputs(2, 20, 20, 8)
    with pytest.raises(ValueError, match=r"delta .* must have u's shape"):
        scan_cpu(u, delta[:, :-1], A, B, C, D, bias)
    with pytest.raises(ValueError, match=r"B and C must be \(batch, tokens, states\) = \(2, 20, 8\)"):
        scan_cpu(u, delta, A, B[..., :-1], C, D, bias)
    with pytest.raises(ValueError, match="use scan_backend=reference"):
        scan_cpu(u.double(), delta.double(), A, B, C, D, bias)
