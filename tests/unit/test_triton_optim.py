"""The optimizer's Triton kernels in Triton's interpreter, and compiled ahead for A100 and H100."""

import pytest
import torch

pytest.importorskip("triton", reason="the optimizer's Triton kernels need the triton package")

from mambavision.ops import triton_compile
from tests.unit.triton_interpreter import interpret

COMMON = """
import copy, itertools, math, torch
from torch import nn
from mambavision.optim import triton_lists
from mambavision.optim.lamb import lamb_multi_tensor
from mambavision.optim.triton_lists import BLOCK, average_triton, lamb_triton, norm_triton

SHAPES = [(), (1,), (0,), (BLOCK,), (BLOCK + 1,), (5, 7), (3 * BLOCK - 1,), (8, 4, 3, 3)]

def randn_list(seed, spread=0.0):
    torch.manual_seed(seed)
    return [10 ** (spread * torch.randn(())) * torch.randn(shape) for shape in SHAPES]

def like(tensors, dtype=torch.float32):
    return [torch.zeros_like(t, dtype=dtype) for t in tensors]

def relative_error(got, want):
    return max(((g.double() - w).norm() / w.norm().clamp(min=1e-300)).item() for g, w in zip(got, want))

def settings(step, weight_decay, refused=0.0, eps=1e-8):
    scalars = {"step": torch.tensor(float(step)), "refused": torch.tensor(refused)}
    return scalars | {"lr": 5e-3 / step, "betas": (0.9, 0.999), "eps": eps, "weight_decay": weight_decay}
"""

LAMB_EQUALS_FLOAT64 = """
for weight_decay in (0.05, 0.0):
    weights = randn_list(0)
    weights[4].zero_()  # no norm: a trust ratio of 1
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)  # its gradients come contiguous
    exact = [w.double() for w in weights]
    runs = []
    for _ in range(2):
        ours, moments = [w.clone() for w in weights], [like(weights), like(weights)]
        for step in range(1, 6):
            grads = randn_list(step, spread=3)
            if step == 1:
                grads[5].zero_()  # without decay no update either
            kept = [g.clone() for g in grads]
            lamb_triton(ours, grads, *moments, divisor=torch.tensor(3.0), **settings(step, weight_decay))
            assert all(torch.equal(g, k) for g, k in zip(grads, kept))
        runs.append([*ours, *moments[0], *moments[1]])
    assert all(torch.equal(a, b) for a, b in zip(*runs)), "not repeatable"
    assert ours[0]._version == 5, "autograd was not told of the change"
    exact_moments = [like(exact, torch.float64), like(exact, torch.float64)]
    for step in range(1, 6):
        grads = [g.double() for g in randn_list(step, spread=3)]
        if step == 1:
            grads[5].zero_()
        divisor = torch.tensor(3.0, dtype=torch.float64)
        lamb_multi_tensor(exact, grads, *exact_moments, divisor=divisor, **settings(step, weight_decay))
    assert relative_error(runs[0], [*exact, *exact_moments[0], *exact_moments[1]]) < 1e-6
"""

LAMB_FIRST_STEP_AND_ZERO_UPDATE = """
# 1 - beta^step where it cancels most, and where it is 1; without decay the first update is sign(g) = 1.
one = [torch.zeros(3)]
for betas in ((0.9, 0.999), (0.0, 0.999999), (0.5, 0.0)):
    for step in (1, 2, 7, 300, 1_000_000):
        m, v = [torch.full((3,), 1 - betas[0] ** step)], [torch.full((3,), 1 - betas[1] ** step)]
        unit = [torch.ones(3)]  # keeps both moments where a constant gradient of 1 would have brought them
        m[0] -= (1 - betas[0]) * (1 - m[0]) / betas[0] if betas[0] else 0
        v[0] -= (1 - betas[1]) * (1 - v[0]) / betas[1] if betas[1] else 0
        w = [torch.zeros(3)]
        arguments = settings(step, 0.0) | {"betas": betas, "lr": 1.0}
        lamb_triton(w, unit, m, v, divisor=torch.tensor(1.0), **arguments)
        tolerance = 3e-6 if betas[1] < 0.9999 else 1e-2  # what float32 keeps of so small a v
        assert (w[0] + 1).abs().max() < tolerance, (betas, step, w)

# Neither weight nor gradient: an update of 0, and a trust ratio of 1 that leaves it there. With eps = 0 that update would be
# 0 / 0; it must not come from beyond a tensor's end.
w = [torch.zeros(5), torch.ones(5)]
lamb_triton(w, [torch.zeros(5), torch.ones(5)], like(w), like(w), divisor=torch.tensor(1.0), **settings(1, 0.05))
assert torch.equal(w[0], torch.zeros(5)), w
w = [torch.ones(5)]
lamb_triton(w, [torch.ones(5)], like(w), like(w), divisor=torch.tensor(1.0), **settings(1, 0.05, eps=0.0))
assert torch.allclose(w[0], torch.full((5,), 1 - 5e-3)), w
"""

REFUSED = """
weights, bad = randn_list(0), randn_list(1)
bad[6][5] = math.nan
bad[3][7] = math.inf
state = [weights, randn_list(2), [t.abs() for t in randn_list(3)]]
before = copy.deepcopy(state)
for weight_decay in (0.05, 0.0):
    lamb_triton(weights, bad, *state[1:], divisor=torch.tensor(math.nan), **settings(1, weight_decay, refused=1.0))
average_triton(weights, bad, 0.5, torch.tensor(1.0))
assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*state), itertools.chain(*before)))
"""

AVERAGE = """
averages = randn_list(0)
averages[-1] = averages[-1].to(memory_format=torch.channels_last)
want = [a.double() for a in averages]
for seed in range(1, 4):
    values = randn_list(seed)  # elsewhere each time, as are gradients that were set to None
    average_triton(averages, values, 0.2, torch.tensor(0.0) if seed % 2 else None)
    want = [0.8 * a + 0.2 * v.double() for a, v in zip(want, values)]
    assert relative_error(averages, want) < 1e-6
values[-1] = values[-1].to(memory_format=torch.channels_last)
average_triton(averages, values, 0.2, None)
before = triton_lists._addresses.cache_info().misses, triton_lists._blocks.cache_info().misses
average_triton(averages, values, 0.2, None)  # nothing moved: nothing built
assert (triton_lists._addresses.cache_info().misses, triton_lists._blocks.cache_info().misses) == before
values[3] = values[3].clone()
average_triton(averages, values, 1.0, None)
assert triton_lists._addresses.cache_info().misses == before[0] + 1
assert torch.allclose(averages[3], values[3])
try:
    average_triton(averages, [*values[:-1], torch.zeros(7, 4, 3, 3)], 0.2, None)
except ValueError as error:
    assert "differ in size; make a new ModelEma" in str(error), error
else:
    raise AssertionError("a value of another shape was read beyond its end")
"""

NORM = """
tensors = randn_list(0, spread=2)
want = torch.cat([t.double().flatten() for t in tensors]).norm().item()
got = norm_triton(tensors)
assert got.shape == () and got.dtype == torch.float32
assert abs(got.item() / want - 1) < 1e-6
assert torch.equal(norm_triton(tensors), got)
assert norm_triton([torch.zeros(3), torch.zeros(0)]).item() == 0.0
assert norm_triton([torch.full((BLOCK + 1,), 1e20)]).item() == math.inf  # as torch's: its square is beyond float32
for place, value in itertools.product((0, 3, 6), (math.inf, -math.inf, math.nan)):
    broken = [t.clone() for t in tensors]
    broken[place].view(-1)[-1] = value
    assert not math.isfinite(norm_triton(broken).item())
    assert math.isnan(norm_triton(broken).item()) == math.isnan(value)
many = [torch.ones(1) for _ in range(triton_lists.NORM_WIDTH + 3)]  # more blocks than the last program takes at once
assert abs(norm_triton(many).item() - len(many) ** 0.5) < 1e-4
"""


@pytest.mark.slow  # starts a process of its own
@pytest.mark.parametrize(
    "lines",
    [LAMB_EQUALS_FLOAT64, LAMB_FIRST_STEP_AND_ZERO_UPDATE, REFUSED, AVERAGE, NORM],
    ids=["LAMB equals float64", "LAMB's first step", "refused steps change nothing", "average", "norm"],
)
def test_in_the_interpreter(lines: str):
    assert "FINE" in interpret(COMMON + lines + "print('FINE')")


@pytest.mark.slow
@pytest.mark.skipif(
    not triton_compile.cuobjdump().exists(),
    reason="this build of Triton ships no cuobjdump to read register counts with",
)
@pytest.mark.parametrize("architecture", triton_compile.ARCHITECTURES)
@pytest.mark.parametrize(
    "name", [name for name, variant in triton_compile.VARIANTS.items() if variant.dtypes == ("fp32",)]
)
def test_optimizer_compiles_without_spills(name, architecture):
    usage = triton_compile.compile_ahead(name, architecture, "fp32")
    assert usage.stack_bytes == 0, usage
    assert usage.registers <= 168, "fewer than 3 programs of 4 warps on a multiprocessor"
    assert usage.shared_bytes <= 1024, usage


def test_a_step_over_all_groups_of_layer_decay_builds_no_table_again():
    from mambavision.optim import triton_lists

    groups = [[torch.zeros(elements)] for elements in range(1, 51)]  # as many as MambaVision-L2 has
    for _ in range(2):
        before = triton_lists._addresses.cache_info().misses, triton_lists._blocks.cache_info().misses
        for tensors in groups:
            triton_lists._table(tensors, tensors)
    assert (triton_lists._addresses.cache_info().misses, triton_lists._blocks.cache_info().misses) == before
