"""Which backend a scan takes, and the reference's arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from mambavision.ops import backend_choice, choose_backend, selective_scan, selective_scan_tokens
from mambavision.ops.reference import CHUNK_TOKENS, scan_reference


def inputs(batch=2, tokens=11, channels=6, states=4, dtype=torch.float64, grad=False):
    torch.manual_seed(0)
    u, delta = torch.randn(2, batch, tokens, channels, dtype=dtype).unbind(0)
    A = -torch.rand(channels, states, dtype=dtype) - 0.2
    B, C = torch.randn(2, batch, tokens, states, dtype=dtype).unbind(0)
    D, bias = torch.randn(2, channels, dtype=dtype).unbind(0)
    return [t.clone().requires_grad_(grad) for t in (u, delta, A, B, C, D, bias)]


def recurrence(u, delta, A, B, C, D, bias):
    """The definition, one number at a time."""
    y = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for d in range(u.shape[2]):
            h = torch.zeros_like(A[d])
            for t in range(u.shape[1]):
                step = F.softplus(delta[b, t, d] + bias[d])
                h = torch.exp(step * A[d]) * h + step * B[b, t] * u[b, t, d]
                y[b, t, d] = (C[b, t] * h).sum() + D[d] * u[b, t, d]
    return y


def test_reference_is_the_recurrence():
    arguments = inputs()
    torch.testing.assert_close(scan_reference(*arguments), recurrence(*arguments))


def test_reference_gradients_are_those_of_finite_differences_twice():
    arguments = inputs(batch=1, tokens=3, channels=2, states=2, grad=True)
    assert torch.autograd.gradcheck(scan_reference, arguments)
    assert torch.autograd.gradgradcheck(scan_reference, arguments)


@pytest.mark.slow
def test_a_long_scan_in_chunks_equals_one_piece_in_value_and_gradient():
    from mambavision.ops import reference

    arguments = inputs(batch=1, tokens=2 * CHUNK_TOKENS + 3, channels=2, states=2, grad=True)
    scan_reference(*arguments).square().sum().backward()
    chunked = [t.grad.clone() for t in arguments]
    for t in arguments:
        t.grad = None
    u, delta, A, B, C, D, bias = arguments
    y, _ = reference._scan_chunk(u, F.softplus(delta + bias), A, B, C, u.new_zeros(1, 2, 2))
    (y + u * D).square().sum().backward()
    for found, t in zip(chunked, arguments, strict=True):
        torch.testing.assert_close(found, t.grad)


def test_without_skip_and_bias():
    u, delta, A, B, C, _, _ = inputs()
    zeros = torch.zeros(6, dtype=u.dtype)
    torch.testing.assert_close(
        scan_reference(u, delta, A, B, C, None, None), scan_reference(u, delta, A, B, C, zeros, zeros)
    )


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_tokens_give_no_outputs(backend: str):
    u, delta, A, B, C, D, bias = (t.float() for t in inputs(tokens=0))
    y = selective_scan_tokens(u.requires_grad_(), delta, A, B, C, D, bias, backend=backend)
    y.sum().backward()
    assert y.shape == u.shape == u.grad.shape


def test_reference_keeps_a_float32_state_under_autocast():
    arguments = inputs(tokens=64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scan_reference(*arguments)
    torch.testing.assert_close(found, scan_reference(*arguments), rtol=0, atol=0)


def test_channels_first_and_tokens_major_are_the_same_scan():
    u, delta, A, B, C, D, bias = inputs(dtype=torch.float32)
    flipped = selective_scan(*(t.transpose(1, 2) for t in (u, delta)), A, *(t.transpose(1, 2) for t in (B, C)), D, bias)
    torch.testing.assert_close(flipped.transpose(1, 2), selective_scan_tokens(u, delta, A, B, C, D, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_automatic_backend_agrees_with_the_reference_on_slices_of_a_projection(dtype):
    _, delta, A, _, _, D, bias = inputs(dtype=torch.float32)
    projected = torch.randn(2, 11, 6 + 4 + 4 + 2, dtype=dtype)
    u, B, C = projected[..., :6], projected[..., 6:10], projected[..., 10:14]
    arguments = (u, delta.to(dtype), A, B, C, D, bias)
    torch.testing.assert_close(
        selective_scan_tokens(*arguments),
        selective_scan_tokens(*arguments, backend="reference"),
        **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}),
    )


def test_float64_takes_the_reference_whatever_is_asked():
    assert choose_backend("cpu", torch.float64, "auto") == "reference"
    assert choose_backend("cuda", torch.float64, "triton") == "reference"


def test_the_environment_overrides_auto_and_a_keyword_overrides_it(monkeypatch):
    monkeypatch.setenv("MAMBAVISION_SCAN_BACKEND", "reference")
    assert choose_backend("cpu", torch.float32) == "reference"
    monkeypatch.setenv("MAMBAVISION_SCAN_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"'fastest' does not exist.*MAMBAVISION_SCAN_BACKEND"):
        choose_backend("cpu", torch.float32)
    assert choose_backend("cpu", torch.float32, "reference") == "reference"


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "message"),
    [
        (
            "cpu",
            torch.float32,
            "triton",
            "runs on cuda tensors, this one is on cpu; choose one of auto, cpu, reference",
        ),
        (
            "cuda",
            torch.float32,
            "cpu",
            "runs on cpu tensors, this one is on cuda; choose one of auto, triton, mamba_ssm",
        ),
        ("cpu", torch.float16, "cpu", "takes float32 and bfloat16, not torch.float16"),
        ("cpu", torch.float32, "cuda", "'mamba_ssm' runs on cuda tensors"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_those_that_can(device, dtype, backend, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(device, dtype, backend)


def test_cuda_without_any_backend_is_an_error_with_advice_not_a_slow_run(monkeypatch):
    monkeypatch.setattr(backend_choice, "installed_backends", lambda: ())
    with pytest.raises(RuntimeError, match=r"pip install triton.*requirements-gpu.*scan_backend=reference"):
        choose_backend("cuda", torch.float32)
    for backend, package in (("triton", "pip install triton"), ("mamba_ssm", "requirements-gpu")):
        with pytest.raises(RuntimeError, match=package):
            choose_backend("cuda", torch.bfloat16, backend)


@pytest.mark.parametrize(
    ("position", "name", "shape", "message"),
    [
        (1, "delta", (2, 11, 5), r"wants delta of shape \(2, 11, 6\), got \(2, 11, 5\)"),
        (3, "B", (2, 4, 11), r"with 4 states wants B of shape \(2, 11, 4\), got \(2, 4, 11\)"),
        (5, "D", (1,), r"wants D of shape \(6,\), got \(1,\)"),
    ],
)
def test_shapes_that_would_broadcast_into_a_wrong_answer_are_refused(position, name, shape, message):
    arguments = inputs()
    arguments[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        selective_scan_tokens(*arguments)


def test_the_mamba_ssm_wrapper_traces_with_right_shapes_without_the_package():
    """Its fake kernels alone, on CUDA fake tensors: what torch.compile sees."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mambavision.ops.mamba_ssm_scan import scan_mamba_ssm

    with FakeTensorMode():
        shapes = {"u": (2, 49, 16), "delta": (2, 49, 16), "A": (16, 8), "B": (2, 49, 8), "C": (2, 49, 8), "D": (16,)}
        half = ("u", "delta", "B", "C")
        arguments = [
            torch.empty(s, device="cuda", dtype=torch.bfloat16 if n in half else torch.float32)
            for n, s in {**shapes, "bias": (16,)}.items()
        ]
        y = scan_mamba_ssm(*arguments)
        assert y.shape == (2, 49, 16) and y.dtype == torch.bfloat16
        _, states = torch.ops.mambavision.mamba_ssm_forward(*arguments)
        gradients = torch.ops.mambavision.mamba_ssm_backward(y, *arguments, states)
        assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in arguments]
