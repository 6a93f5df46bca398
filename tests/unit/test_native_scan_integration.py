"""The compiled CPU scan under what surrounds it: torch.compile, export, autocast, DDP, gradients of gradients."""

from __future__ import annotations

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from mambavision.distributed import close_world, join_group
from mambavision.ops.cpu_scan import scan_cpu
from mambavision.ops.native_build import load_native
from tests.unit.test_native_scan import scan_inputs

pytestmark = pytest.mark.skipif(load_native() is None, reason="no C++ compiler here: the compiled scan cannot be built")


class TinyMixer(nn.Module):
    """A projection whose slices feed the scan, as in the model."""

    def __init__(self, channels: int = 16, states: int = 8):
        super().__init__()
        self.sizes = [channels, channels, states, states]
        self.projection = nn.Linear(channels, sum(self.sizes))
        self.A = nn.Parameter(-torch.rand(channels, states) - 0.5)
        self.D = nn.Parameter(torch.ones(channels))
        self.delta_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        u, delta, B, C = self.projection(tokens).split(self.sizes, dim=-1)
        return scan_cpu(u, delta, self.A, B, C, self.D, self.delta_bias)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(dtype):
    inputs = scan_inputs(2, 33, 20, 8, dtype)  # 20 channels: padding that narrow vectors do not reach
    scan_cpu(*inputs)  # builds and registers
    y, checkpoints = torch.ops.mambavision.scan_forward(*inputs, True)
    torch.library.opcheck(torch.ops.mambavision.scan_forward.default, (*inputs, True))
    torch.library.opcheck(torch.ops.mambavision.scan_backward.default, (torch.ones_like(y), *inputs, checkpoints))
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)
    torch.library.opcheck(torch.ops.mambavision.selective_scan.default, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break_to_the_same_values_and_gradients(autocast):
    torch._dynamo.reset()
    model, tokens = TinyMixer(), torch.randn(2, 20, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager_y, compiled_y = model(tokens), compiled(tokens)
    assert eager_y.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(compiled_y, eager_y)
    eager = torch.autograd.grad(eager_y.float().square().mean(), list(model.parameters()))
    compiled = torch.autograd.grad(compiled_y.float().square().mean(), list(model.parameters()))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
def test_exports_as_one_operator():
    model, tokens = TinyMixer().eval(), torch.randn(2, 20, 16)
    program = torch.export.export(model, (tokens,))
    assert sum("mambavision.selective_scan" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(tokens), model(tokens))


def test_mixed_dtypes_are_widened_and_gradients_come_back_in_each_ones_own():
    inputs = scan_inputs(2, 20, 16, 8)
    dtypes = [torch.float32, *[torch.bfloat16] * 6]
    leaves = [tensor.to(dtype).requires_grad_() for tensor, dtype in zip(inputs, dtypes)]
    y = scan_cpu(*leaves)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert [leaf.grad.dtype for leaf in leaves] == dtypes


def test_double_backward_is_refused_and_says_what_to_use():
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(1, 5, 4, 8)]
    (du,) = torch.autograd.grad(scan_cpu(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .*use scan_backend=reference"):
        du.sum().backward()


def test_no_states_are_kept_when_no_gradient_is_wanted():
    inputs = scan_inputs(2, 40, 16, 8)
    assert torch.ops.mambavision.scan_forward(*inputs, False)[1].numel() == 0
    with torch.no_grad():
        assert scan_cpu(inputs[0].requires_grad_(), *inputs[1:]).grad_fn is None


@pytest.mark.slow
def test_two_data_parallel_ranks_have_the_gradients_of_the_whole_batch(tmp_path):
    mp.spawn(_rank_equals_whole_batch, args=(str(tmp_path / "store"),), nprocs=2)


def _rank_equals_whole_batch(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    join_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, tokens = TinyMixer(), torch.randn(4, 20, 16)
    whole = torch.autograd.grad(model(tokens).square().mean(), list(model.parameters()))
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(tokens[2 * rank : 2 * rank + 2]).square().mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(whole))
    del parallel
    close_world()
