"""The CUDA scans on a real device: equal to a float64 recurrence, repeatable, without host syncs, compilable."""

import pytest
import torch

from mambavision.ops.backend_choice import (
    Problem,
    choose_cuda_backend,
    example_inputs,
    installed_backends,
    milliseconds,
)
from mambavision.ops.reference import scan_reference

NAMES = ("y", "du", "ddelta", "dA", "dB", "dC", "dD", "dbias")


def scan_of(backend):
    if backend not in installed_backends():
        pytest.skip(f"{backend} is not installed")
    if backend == "triton":
        from mambavision.ops.triton_scan import scan_triton

        return scan_triton
    from mambavision.ops.mamba_ssm_scan import scan_mamba_ssm

    return scan_mamba_ssm


def run(scan, inputs, dy, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def relative_errors(got, want):
    return {name: ((g.double() - w).norm() / w.norm().clamp_min(1e-12)).item() for name, g, w in zip(NAMES, got, want)}


# The network's (T, B, L), odd ones, windows enough to share programs, and a long one that is cut into chunks.
SHAPES = [(32, 196, 160), (32, 49, 320), (8, 196, 392), (3, 37, 41), (1, 1, 5), (1000, 49, 48), (1, 3136, 160)]


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_equals_the_float64_recurrence(backend, dtype, shape, cuda):
    inputs = example_inputs(Problem(*shape, 8, dtype), cuda)
    dy = torch.randn(shape, device=cuda).to(dtype)
    got = run(scan_of(backend), inputs, dy)
    want = run(scan_reference, inputs, dy, torch.float64)
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for name, error in relative_errors(got, want).items():
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("states", [1, 4, 16, 64])
def test_triton_takes_other_state_sizes(states, cuda):
    inputs = example_inputs(Problem(4, 49, 48, states, torch.float32), cuda)
    dy = torch.randn(4, 49, 48, device=cuda)
    errors = relative_errors(run(scan_of("triton"), inputs, dy), run(scan_reference, inputs, dy, torch.float64))
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("shape", [(128, 196, 160), (1, 12544, 160)])
def test_triton_is_bitwise_repeatable(shape, cuda):
    inputs = example_inputs(Problem(*shape, 8, torch.bfloat16), cuda)
    dy = torch.randn(shape, device=cuda).bfloat16()
    first = run(scan_of("triton"), inputs, dy)
    for _ in range(10):
        assert all(map(torch.equal, first, run(scan_of("triton"), inputs, dy)))


def test_triton_reads_slices_of_a_projection_in_place(cuda):
    scan = scan_of("triton")
    projection = torch.randn(8, 49, 3 * 48 + 16, device=cuda)
    u, delta, B, C = projection[..., 3:51], projection[..., 51:99], projection[..., -16:-8], projection[..., -8:]
    A = -torch.rand(48, 8, device=cuda)
    sliced = scan(u, delta, A, B, C, None, None)
    assert torch.equal(sliced, scan(*(t.contiguous() for t in (u, delta, A, B, C)), None, None))


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_scan_does_not_wait_for_the_device(backend, cuda, no_host_sync):
    scan = scan_of(backend)
    inputs = example_inputs(Problem(8, 49, 160, 8, torch.bfloat16), cuda)
    dy = torch.randn(8, 49, 160, device=cuda).bfloat16()
    run(scan, inputs, dy)  # compiles
    with no_host_sync:
        run(scan, inputs, dy)


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_scan_compiles_without_a_graph_break(backend, cuda):
    scan = scan_of(backend)
    inputs = example_inputs(Problem(8, 49, 160, 8, torch.bfloat16), cuda)
    dy = torch.randn(8, 49, 160, device=cuda).bfloat16()
    compiled = run(torch.compile(scan, fullgraph=True), inputs, dy)
    errors = relative_errors(compiled, [t.double() for t in run(scan, inputs, dy)])
    assert max(errors.values()) < 1e-2, errors


def test_triton_can_be_captured_in_a_cuda_graph(cuda):
    scan = scan_of("triton")
    inputs = [t.detach() for t in example_inputs(Problem(8, 49, 160, 8, torch.bfloat16), cuda)]
    expected = scan(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scan(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_long_scan_keeps_to_its_memory(cuda):
    scan = scan_of("triton")
    inputs = example_inputs(Problem(1, 12544, 160, 8, torch.float32), cuda)
    dy = torch.randn(1, 12544, 160, device=cuda)
    run(scan, inputs, dy)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(scan, inputs, dy)
    own = 2 * sum(t.numel() * t.element_size() for t in [*inputs, dy])  # inputs, y, and the gradients of each
    assert torch.cuda.max_memory_allocated() - before < 3 * own


def test_a_backend_is_measured_where_no_gradient_is_recorded_too(cuda):
    with torch.inference_mode():
        assert 0 < milliseconds("triton", Problem(8, 49, 160, 8, torch.bfloat16), cuda) < 5


def test_the_choice_is_measured_once_and_remembered(cuda, tmp_path):
    if len(installed_backends()) < 2:
        pytest.skip("only one CUDA backend is installed: nothing to choose between")
    problem, file = Problem(8, 49, 160, 8, torch.bfloat16), tmp_path / "choice.json"
    chosen = choose_cuda_backend(problem, cuda, cache_file=file)
    assert chosen in installed_backends() and file.exists()
    assert choose_cuda_backend(problem, cuda, cache_file=file) == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 196, 320), (128, 49, 640), (3, 37, 41), (1, 1, 5)])
def test_token_convolution_equals_conv1d(dtype, shape, cuda):
    from mambavision.ops.triton_conv import conv_silu_tokens_triton

    def plain(x, weight):
        y = torch.nn.functional.conv1d(x.transpose(1, 2), weight, padding=1, groups=weight.shape[0])
        return torch.nn.functional.silu(y).transpose(1, 2)

    x = torch.randn(*shape[:2], 2 * shape[2], device=cuda).to(dtype)[..., shape[2] :]
    weight = torch.randn(shape[2], 1, 3, device=cuda)
    dy = torch.randn(shape, device=cuda).to(dtype)
    got, want = run(conv_silu_tokens_triton, (x, weight), dy), run(plain, (x, weight), dy, torch.float64)
    for name, g, w in zip(("y", "dx", "dweight"), got, want):
        error = ((g.double() - w).norm() / w.norm()).item()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}: {error:.1e}"
