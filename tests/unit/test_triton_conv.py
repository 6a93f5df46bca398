"""The Triton token convolution in Triton's interpreter, and compiled ahead for A100 and H100."""

import pytest

pytest.importorskip("triton", reason="the Triton convolution needs the triton package")

from mambavision.ops import triton_compile
from tests.unit.triton_interpreter import interpret

IN_INTERPRETER = """
import torch
from mambavision.ops.triton_conv import conv_silu_tokens_triton

def plain(x, weight):
    y = torch.nn.functional.conv1d(x.transpose(1, 2), weight, padding=1, groups=weight.shape[0])
    return torch.nn.functional.silu(y).transpose(1, 2)

def run(convolve, x, weight, dy, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
    y = convolve(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

torch.manual_seed(0)
for shape, dtype, limit in (
    ((2, 49, 70), torch.float32, 1e-6),
    ((5, 37, 24), torch.bfloat16, 6e-3),
    ((1, 1, 3), torch.float32, 1e-6),
    ((1, 2, 3), torch.float16, 1e-3),
):
    b, L, c = shape
    x = torch.randn(b, L, 2 * c + 1).to(dtype)[..., c + 1 :]  # the second half of a projection, read in place
    weight, dy = torch.randn(c, 1, 3), torch.randn(b, L, c).to(dtype)
    got = run(conv_silu_tokens_triton, x, weight, dy)
    want = run(plain, x, weight, dy, torch.float64)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32
    for name, g, w in zip(("y", "dx", "dweight"), got, want):
        error = ((g.double() - w).norm() / w.norm()).item()
        assert error < (1e-6 if name == "dweight" else limit), (name, shape, dtype, error)

x, weight = torch.randn(1, 5, 4, requires_grad=True), torch.randn(4, 1, 3, requires_grad=True)
checks = ("test_schema", "test_autograd_registration", "test_faketensor")
torch.library.opcheck(torch.ops.mambavision.triton_conv_silu_forward.default, (x, weight), test_utils=checks)
first = torch.autograd.grad(conv_silu_tokens_triton(x, weight).sum(), x, create_graph=True)[0]
try:
    torch.autograd.grad(first.sum(), x)
except RuntimeError as error:
    assert "twice" in str(error), error
else:
    raise AssertionError("a second derivative was given")
print("FINE")
"""


@pytest.mark.slow  # starts a process of its own
def test_convolution_and_its_gradients_equal_float64():
    assert "FINE" in interpret(IN_INTERPRETER)


@pytest.mark.slow
@pytest.mark.skipif(
    not triton_compile.cuobjdump().exists(),
    reason="this build of Triton ships no cuobjdump to read register counts with",
)
@pytest.mark.parametrize("architecture", triton_compile.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in triton_compile.VARIANTS if name.startswith("conv")])
def test_convolution_compiles_without_spills(name, architecture, dtype):
    usage = triton_compile.compile_ahead(name, architecture, dtype)
    assert usage.stack_bytes == 0, usage
    assert usage.registers <= 168, "fewer than 3 programs of 4 warps on a multiprocessor"
    assert usage.shared_bytes <= 16384, usage
