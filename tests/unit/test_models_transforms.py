"""The model in the hands of others: exporters, tracers, torch.func, adapters, hooks, checkpointing, several forwards."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from mambavision.models import fuse_for_inference
from mambavision.ops.native_build import load_native
from mambavision.ops.reference import CHUNK_TOKENS, scan_reference
from mambavision.ops.selective_scan import choose_backend
from tests.unit.model_samples import micro, relative
from tests.unit.test_native_scan import scan_inputs

DEPTHS = (1, 1, 2, 2)  # each kind of block; a mixer and an attention in stages 3 and 4


def sample(**architecture) -> nn.Module:
    torch.manual_seed(0)
    return micro(depths=DEPTHS, **architecture)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the image size is a constant of a trace
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_trace_with_gradients_recorded_passes_torchs_own_check_at_another_batch(images, backend):
    model = sample(scan_backend=backend).eval()
    traced = torch.jit.trace(model, images)  # traces again without gradients, and compares
    assert relative(traced(images[:1]), model(images[:1])) < 1e-5
    operators = {node.kind() for node in traced.inlined_graph.nodes() if "mambavision" in node.kind()}
    assert operators == ({"mambavision::selective_scan"} if backend == "auto" else set())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_exported_program_holds_no_operator_of_ours_but_the_scan(images, backend):
    model = sample(scan_backend=backend).eval()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert relative(program.module()(images[:2]), model(images[:2])) < 1e-5
    operators = {str(node.target) for node in program.graph.nodes if "mambavision" in str(node.target)}
    assert operators == ({"mambavision.selective_scan.default"} if backend == "auto" else set())


def test_onnx_unrolls_the_scan_and_refuses_one_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # the exporters need packages of their own
    assert choose_backend("cpu", torch.float32) == choose_backend("cuda", torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match=r"'cpu' is an operator that ONNX does not know; export .* scan_backend=auto"):
        choose_backend("cpu", torch.float32, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
def test_the_onnx_file_computes_the_same_in_another_runtime(images, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = sample().eval()
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=dynamo)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert relative(torch.from_numpy(found), model(images).detach()) < 1e-5


@pytest.mark.filterwarnings("ignore")  # torch's own, on the speed of vmap
def test_gradients_of_single_images_through_torch_func_add_up_to_those_of_the_batch(images):
    model = sample().eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (image[None],)).square().sum()

    single = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    model(images).square().sum().backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(single[name].sum(0), expected, rtol=1e-4, atol=1e-4, msg=name)


def test_the_reference_scan_of_many_tokens_has_gradients_through_torch_func():
    inputs = [t.requires_grad_() for t in scan_inputs(1, CHUNK_TOKENS + 9, 3, 2)]
    found = torch.func.grad(lambda *given: scan_reference(*given).square().sum(), argnums=tuple(range(7)))(*inputs)
    expected = torch.autograd.grad(scan_reference(*inputs).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_a_forward_derivative_through_torch_func_equals_float64(images):
    model = sample().eval()
    exact, direction = copy.deepcopy(model).double(), torch.randn_like(images)
    _, found = torch.func.jvp(model, (images,), (direction,))
    _, expected = torch.func.jvp(exact, (images.double(),), (direction.double(),))
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_of_the_gradient_equals_float64_with_the_reference_scan_and_is_refused_by_the_native(
    images, training
):
    model, exact = (sample(scan_backend="reference").train(training) for _ in range(2))
    exact.double()
    for network, x in ((model, images.requires_grad_()), (exact, images.detach().double().requires_grad_())):
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    found, expected = gradients(model), gradients(exact)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * largest, name
    (slope,) = torch.autograd.grad(sample()(images).square().sum(), images, create_graph=True)
    if load_native() is not None:
        with pytest.raises(RuntimeError, match="no second derivative .*use scan_backend=reference"):
            slope.square().sum().backward()


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_two_forward_passes_before_one_backward_are_the_sum_of_both(images, precision, tolerance):
    model = sample().train()
    apart = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        (model(images).square().sum() + model(images.flip(0) + 1).square().sum()).backward()
        apart(images).square().sum().backward()
        apart(images.flip(0) + 1).square().sum().backward()
    found = torch.cat([g.flatten() for g in gradients(model).values()])
    assert relative(found, torch.cat([g.flatten() for g in gradients(apart).values()])) < tolerance


def test_gradient_checkpointing_moves_the_running_statistics_once(images):
    plain = sample().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        model(images).square().sum().backward()
    for (name, expected), found in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


class Adapted(nn.Module):
    """As LoRA wraps a layer: its weight and bias are those of the base, its function is not."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(0.5))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.base.bias
        if bias is not None and not isinstance(self.base, nn.Linear):
            bias = bias.view(-1, *[1] * (x.dim() - 2))
        shift = 0.0 if bias is None else bias
        return self.scale * (self.base(x) - shift) + shift


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_an_adapter_replaced_are_called(images, training):
    model = sample().train(training)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and "patch_embed" not in name:
            model.set_submodule(name, Adapted(module))
    merged = sample().train(training)
    with torch.no_grad():
        for module in merged.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module is not merged.patch_embed.conv_down[0]:
                module.weight.mul_(1.0 if module is merged.patch_embed.conv_down[3] else 0.5)
    torch.testing.assert_close(model(images), merged(images), rtol=1e-4, atol=1e-4)
    model(images).square().sum().backward()
    assert all(module.scale.grad is not None for module in model.modules() if isinstance(module, Adapted))
    with pytest.raises(ValueError, match=r"is a Adapted or has hooks.*merge_and_unload"):
        fuse_for_inference(model)


def test_hooks_on_every_layer_are_called_in_training_and_evaluation(images):
    model, seen = sample(), set()
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d | nn.BatchNorm2d)}
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.add(name))
    for mode in (True, False):
        seen.clear()
        model.train(mode)(images)
        assert seen == layers


def test_pruned_weights_are_computed_anew_at_every_step(images):
    model = sample().train()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.5)
    for _ in range(2):  # a weight kept from the first step would have lost its graph
        model(images).square().sum().backward()
    model.eval()
    before = model(images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mixer.in_proj.weight_orig"):
                parameter.mul_(3.0)
    assert relative(model(images), before) > 1e-3


@pytest.mark.parametrize("change", [{"momentum": None}, {"momentum": 1.0}, {"running_mean": None, "running_var": None}])
def test_batch_norms_with_other_statistics_are_left_to_pytorch(images, change):
    model, expected = sample().train(), sample().train()(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in change.items():
                setattr(module, name, value)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
