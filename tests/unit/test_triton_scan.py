"""The Triton scan without a GPU: its arithmetic in Triton's interpreter, its code compiled ahead for A100 and H100.

The interpreter has to be chosen before Triton is imported, so those tests run in a process of their own.
"""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton scan needs the triton package")

from mambavision.ops import triton_compile, triton_scan
from tests.unit.triton_interpreter import interpret

# The package without its __init__, which brings the models, timm and torchvision: seconds that these tests do not need.
BARE_PACKAGE = f"""
import sys, types
package = types.ModuleType("mambavision")
package.__path__ = [{str(Path(triton_scan.__file__).parents[1])!r}]
sys.modules["mambavision"] = package
"""

NAMES = ("y", "du", "ddelta", "dA", "dB", "dC", "dD", "dbias")

# Runs the cases of argv in the interpreter; prints the relative errors against a float64 recurrence as JSON.
IN_INTERPRETER = """
import json, sys, torch
from mambavision.ops import triton_scan

def recurrence(u, delta, A, B, C, D, bias):
    dt = torch.log1p(torch.exp(delta + bias))
    h, ys = torch.zeros(*u.shape[::2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(ys, 1) + u * D

def inputs(b, L, d, n, dtype):
    projection = torch.randn(b, L, 3 * d + 2 * n + 5).to(dtype)     # slices of it: strides that are not the shapes'
    u, delta = projection[..., 3 : 3 + d], projection[..., 3 + d : 3 + 2 * d]
    B, C = projection[..., -2 * n : -n], projection[..., -n:]
    A = -torch.arange(1.0, n + 1).repeat(d, 1) * (1 + 0.1 * torch.randn(d, n)).abs()
    return [u, delta, A, B, C, torch.randn(d), torch.randn(d) - 1]

def run(scan, tensors, dy, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

results = []
for case in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    for name in ("MINIMUM_CHUNK_TOKENS", "RESIDENT_PROGRAMS", "WAVES"):
        setattr(triton_scan, name, case.get(name, getattr(triton_scan, name)))
    triton_scan._multiprocessors = lambda device: case.get("multiprocessors", 1)
    b, L, d, n = case["shape"]
    tensors = inputs(b, L, d, n, getattr(torch, case["dtype"]))
    dy = torch.randn(b, L, d).to(tensors[0].dtype)
    got = run(triton_scan.scan_triton, tensors, dy)
    again = run(triton_scan.scan_triton, tensors, dy) if case.get("twice") else got
    want = run(recurrence, tensors, dy, torch.float64)
    errors = [((g.double() - w).norm() / w.norm().clamp_min(1e-12)).item() for g, w in zip(got, want)]
    results.append({"errors": errors, "dtypes": [str(g.dtype) for g in got],
                    "repeats": all(map(torch.equal, got, again))})
print("RESULTS " + json.dumps(results))
"""


def check_cases(*cases: dict) -> None:
    output = interpret(BARE_PACKAGE + IN_INTERPRETER, json.dumps(cases))
    results = json.loads(output.split("RESULTS ")[1])
    for case, result in zip(cases, results, strict=True):
        # bfloat16 outputs are rounded to 8 bits; the sums over rows and tokens (dA, dD, dbias) stay float32
        rounded = 6e-3 if case["dtype"] == "bfloat16" else 4e-3 if case["dtype"] == "float16" else 2e-6
        for name, error in zip(NAMES, result["errors"], strict=True):
            limit = 2e-6 if name in ("dA", "dD", "dbias") else rounded
            assert error < limit, f"{name} of {case}: relative error {error:.1e}"
        assert result["repeats"], case


@pytest.mark.slow
def test_scan_and_its_gradients_equal_the_float64_recurrence():
    check_cases(
        {"shape": [1, 49, 4, 8], "dtype": "float32"},
        {"shape": [2, 13, 3, 8], "dtype": "bfloat16"},
        {"shape": [3, 1, 5, 8], "dtype": "float32"},
        # several windows in one program, a last one alone; and one window cut into chunks, the last short
        {"shape": [5, 2, 4, 8], "dtype": "float32", "RESIDENT_PROGRAMS": 2, "WAVES": 1},
        {"shape": [1, 43, 3, 8], "dtype": "float32", "MINIMUM_CHUNK_TOKENS": 12, "multiprocessors": 100},
    )


@pytest.mark.slow
def test_scan_equals_the_recurrence_at_more_shapes():
    check_cases(
        {"shape": [1, 49, 40, 8], "dtype": "float32"},
        {"shape": [2, 37, 21, 8], "dtype": "float32", "multiprocessors": 100},
        {"shape": [1, 37, 21, 8], "dtype": "bfloat16", "multiprocessors": 2},
        {"shape": [2, 21, 24, 8], "dtype": "float16"},
        {"shape": [2, 9, 20, 16], "dtype": "float32", "twice": True},
        {"shape": [1, 20, 6, 1], "dtype": "float32"},
        {"shape": [1, 10, 6, 64], "dtype": "float32"},
        {"shape": [1, 10, 3, 256], "dtype": "float32"},
        {"shape": [1, 150, 6, 8], "dtype": "float32", "MINIMUM_CHUNK_TOKENS": 30, "multiprocessors": 100},
        {"shape": [2, 60, 20, 8], "dtype": "bfloat16", "MINIMUM_CHUNK_TOKENS": 12, "multiprocessors": 9},
    )


AS_AN_OPERATOR = """
import torch
from mambavision.ops.triton_scan import scan_triton

b, L, d, n = 1, 9, 4, 8
shapes = [(b, L, d), (b, L, d), (d, n), (b, L, n), (b, L, n), (d,), (d,)]
tensors = [torch.randn(s) for s in shapes]
tensors[2] = -tensors[2].exp()
leaves = [t.clone().requires_grad_() for t in tensors]
checks = ("test_schema", "test_autograd_registration", "test_faketensor")
torch.library.opcheck(torch.ops.mambavision.triton_scan_forward.default, (*leaves, True), test_utils=checks)
torch.library.opcheck(torch.ops.mambavision.triton_scan_forward.default, (*tensors, False), test_utils=checks)

plain = scan_triton(*leaves)
compiled = torch.compile(scan_triton, fullgraph=True, backend="aot_eager")(*leaves)
assert torch.equal(plain, compiled)
plain_gradients = torch.autograd.grad(plain.sum(), leaves, retain_graph=True)    # dy of stride 0
compiled_gradients = torch.autograd.grad(compiled.sum(), leaves)
assert all(map(torch.equal, plain_gradients, compiled_gradients))

class Scan(torch.nn.Module):
    def forward(self, *tensors):
        return scan_triton(*tensors)

exported = torch.export.export(Scan(), tuple(tensors))
assert torch.equal(exported.module()(*tensors), plain)
assert "triton_scan_forward" in exported.graph_module.code

with torch.autocast("cpu", dtype=torch.bfloat16):
    assert torch.equal(scan_triton(*leaves), plain)
assert scan_triton(tensors[0].bfloat16(), *tensors[1:]).dtype == torch.bfloat16

without = scan_triton(*leaves[:5], None, None)
zeros = scan_triton(*leaves[:5], torch.zeros(d), torch.zeros(d))
assert torch.equal(without, zeros)
assert torch.autograd.grad(without.sum(), leaves[0])[0].shape == (b, L, d)

first = torch.autograd.grad(scan_triton(*leaves).sum(), leaves[0], create_graph=True)[0]
try:
    torch.autograd.grad(first.sum(), leaves[0])
except RuntimeError as error:
    assert "twice" in str(error) and "reference" in str(error), error
else:
    raise AssertionError("a second derivative was given")

def refusal(states=8, dtype=torch.float32):
    u, B = torch.zeros(1, 4, 2, dtype=dtype), torch.zeros(1, 4, states, dtype=dtype)
    try:
        scan_triton(u, u, torch.zeros(2, states), B, B, None, None)
    except ValueError as error:
        return str(error)

assert "power of two" in refusal(states=12) and "use 16 or scan_backend=reference" in refusal(states=12)
assert "u is torch.float64; use scan_backend=reference" in refusal(dtype=torch.float64)
print("OPERATOR FINE")
"""


@pytest.mark.slow
def test_scan_goes_through_compile_export_autocast_and_refuses_double_backward():
    assert "OPERATOR FINE" in interpret(BARE_PACKAGE + AS_AN_OPERATOR)


def test_a_cpu_tensor_is_told_what_to_do_instead():
    tensors = [
        torch.zeros(1, 4, 2),
        torch.zeros(1, 4, 2),
        torch.zeros(2, 8),
        torch.zeros(1, 4, 8),
        torch.zeros(1, 4, 8),
    ]
    with pytest.raises(ValueError, match=r"runs on CUDA tensors, this one is on cpu; use scan_backend=auto"):
        triton_scan.scan_triton(*tensors, None, None)


@pytest.mark.parametrize(
    ("rows", "tokens", "channels", "programs_at_least"),
    [(128, 196, 160, 4 * 108), (128, 49, 320, 4 * 108), (32, 49, 320, 4 * 108), (2, 12544, 160, 4 * 108)],
)
def test_the_networks_shapes_give_every_scheduler_of_an_a100_work(rows, tokens, channels, programs_at_least):
    for plan in (triton_scan.plan_forward, triton_scan.plan_backward):
        groups, width, blocks, rows_per_program, row_groups, chunk_tokens, chunks = plan(rows, tokens, channels, 8, 108)
        assert blocks * row_groups * chunks >= programs_at_least
        assert blocks * groups * width < channels * 1.1, "lanes without a channel"
        assert row_groups * rows_per_program >= rows and chunks * chunk_tokens >= tokens
        assert chunks == 1 or chunk_tokens % triton_scan.CHECKPOINT_EVERY == 0


def test_many_windows_share_a_program():
    plan = triton_scan.plan_backward(4096, 49, 320, 8, 108)
    assert plan.rows_per_program > 1
    at_once = triton_scan.RESIDENT_PROGRAMS * 108
    assert triton_scan.WAVES * at_once <= plan.channel_blocks * plan.row_groups < 5 * at_once


def assert_fits(name: str, architecture: int, dtype: str) -> None:
    usage = triton_compile.compile_ahead(name, architecture, dtype)
    assert usage.stack_bytes == 0, f"{name} sm_{architecture} {dtype} spills {usage.stack_bytes} bytes a thread"
    # A multiprocessor has 65 536 registers: 255 a thread leaves 8 one-warp programs, 2 for each scheduler.
    assert usage.registers <= (255 if "chunked" in name else 176), usage
    assert usage.shared_bytes <= 4096, usage


needs_cuobjdump = pytest.mark.skipif(
    not triton_compile.cuobjdump().exists(),
    reason="this build of Triton ships no cuobjdump to read register counts with",
)


@pytest.mark.slow
@needs_cuobjdump
@pytest.mark.parametrize("name", ["scan forward, 32 wide, training", "scan backward"])
def test_kernels_compile_for_an_a100_without_spills(name):
    assert_fits(name, 80, "bf16")


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("architecture", triton_compile.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [*triton_compile.DTYPES, "fp16"])
@pytest.mark.parametrize("name", [name for name in triton_compile.VARIANTS if name.startswith("scan")])
def test_every_kernel_compiles_without_spills(name, architecture, dtype):
    assert_fits(name, architecture, dtype)
