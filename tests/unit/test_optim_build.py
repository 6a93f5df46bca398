"""Parameter groups by both rules, and every optimizer by name behind one step(grad_norm, clip)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mambavision import create_model
from mambavision.config import OptimizerConfig
from mambavision.optim import (
    OPTIMIZERS,
    build_optimizer,
    build_param_groups,
    global_grad_norm,
    load_optimizer_state,
)


def group_of(model: nn.Module, rule: str) -> dict[str, str]:
    return {name: group["name"] for group in build_param_groups(model, 0.05, rule) for name, _ in group["params"]}


def test_published_rule_decays_matrices_and_also_a_log():
    model = create_model("mambavision_nano")
    groups = group_of(model, "published")
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert groups[name] == ("no_decay" if parameter.ndim <= 1 or name.endswith(".bias") else "decay"), name
    assert {groups[name] for name in groups if name.endswith("A_log")} == {"decay"}
    assert {groups[name] for name in groups if name.endswith(("conv1d_x.weight", "conv1d_z.weight"))} == {"decay"}


def test_mamba_rule_exempts_the_scan_parameters_and_nothing_else():
    model = create_model("mambavision_nano")
    published, mamba = group_of(model, "published"), group_of(model, "mamba")
    changed = {name for name in published if published[name] != mamba[name]}
    assert changed == {name for name in published if name.endswith("A_log")}
    assert changed


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    (group,) = build_param_groups(model, 0.05)
    assert [name for name, _ in group["params"]] == ["1.weight"]
    assert group["weight_decay"] == 0.05
    with pytest.raises(ValueError, match="'published' or 'mamba'"):
        build_param_groups(model, 0.05, "timm")


def test_without_layer_decay_the_groups_are_the_two_of_before():
    model = create_model("mambavision_nano")
    before = build_param_groups(model, 0.05)
    assert [list(group) for group in before] == [["name", "params", "weight_decay"]] * 2
    for off in (None, 1.0):
        assert str(build_param_groups(model, 0.05, layer_decay=off)) == str(before)


@pytest.mark.parametrize("depths", [(2, 1, 3, 2), (1, 3, 12, 4)])
def test_layers_are_stem_then_each_block_with_its_stages_downsampling_then_norm_and_head(depths: tuple[int, ...]):
    model = create_model("mambavision_nano", depths=depths, dim=8, in_dim=8, num_heads=(1, 1, 1, 1))
    whole = {"decay": [], "no_decay": []}
    layer_of, scales = {}, {}
    for group in build_param_groups(model, 0.05, layer_decay=0.5):
        _, layer, kind = group["name"].split("_", 2)
        assert group["weight_decay"] == (0.05 if kind == "decay" else 0.0)
        scales[int(layer)] = group["lr_scale"]
        layer_of |= {name: int(layer) for name, _ in group["params"]}
        whole[kind] += [name for name, _ in group["params"]]
    for group in build_param_groups(model, 0.05):
        assert sorted(whole[group["name"]]) == sorted(name for name, _ in group["params"])
    last = sum(depths) + 1
    assert scales == {layer: 0.5 ** (last - layer) for layer in range(last + 1)}
    for name, layer in layer_of.items():
        part, *rest = name.split(".")
        if part == "levels":
            stage, kind, block = int(rest[0]), rest[1], int(rest[2]) if rest[1] == "blocks" else -1
            expected = sum(depths[:stage]) + 1 + block if kind == "blocks" else sum(depths[: stage + 1])
        else:
            expected = 0 if part == "patch_embed" else last
        assert layer == expected, name


def test_a_checkpoint_whose_groups_are_others_is_refused_with_what_to_do():
    model = create_model("mambavision_nano")
    cfg = OptimizerConfig(name="lamb")
    state = build_optimizer(cfg, build_param_groups(model, 0.05)).state_dict()
    optimizer = build_optimizer(cfg, build_param_groups(model, 0.05, layer_decay=0.8))
    with pytest.raises(
        ValueError, match=r"optimizer.layer_decay or model.freeze turned on or off: take the stored value"
    ):
        load_optimizer_state(optimizer, state)


def small_problem(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.01), build_param_groups(model, 0.05))
    return model, optimizer


def backward(model: nn.Module, scale: float = 1.0) -> None:
    inputs = torch.linspace(-1, 1, 24).reshape(4, 6)
    model.zero_grad()
    (scale * (model(inputs) - 1).square().mean()).backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_keeps_names(name: str):
    model, optimizer = small_problem(name)
    losses = []
    for _ in range(100):
        backward(model)
        losses.append((model(torch.linspace(-1, 1, 24).reshape(4, 6)) - 1).square().mean().item())
        optimizer.step(grad_norm=global_grad_norm(model.parameters()), clip=5.0)
    assert losses[-1] < 0.5 * losses[0]
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "2.bias"],
    ]
    assert optimizer.skipped_steps.item() == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_that_is_not_finite_changes_nothing_in_any_optimizer(name: str):
    model, optimizer = small_problem(name)
    for _ in range(2):
        backward(model)
        optimizer.step(grad_norm=global_grad_norm(model.parameters()), clip=5.0)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    backward(model)
    model[0].weight.grad[1, 2] = float("nan")
    optimizer.step(grad_norm=global_grad_norm(model.parameters()), clip=5.0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[index][key])), key
    assert optimizer.skipped_steps.item() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_whose_first_step_is_refused_goes_on_as_if_it_had_not_been(name: str):
    (model, optimizer), (untroubled, reference) = small_problem(name), small_problem(name)
    backward(model)
    model[0].weight.grad[1, 2] = float("inf")
    optimizer.step()
    for _ in range(3):
        backward(model), backward(untroubled)
        optimizer.step(), reference.step()
    for a, b in zip(model.parameters(), untroubled.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_bounds_the_step_as_torchs_would(name: str):
    (one, folded), (two, separate) = small_problem(name), small_problem(name)
    for _ in range(3):
        backward(one, 100.0), backward(two, 100.0)
        assert global_grad_norm(one.parameters()) > 0.5
        folded.step(grad_norm=global_grad_norm(one.parameters()), clip=0.5)
        torch.nn.utils.clip_grad_norm_(two.parameters(), 0.5)
        separate.step(grad_norm=global_grad_norm(two.parameters()))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "peer"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_torchs_optimizers_keep_their_arithmetic(name: str, peer: type[torch.optim.Optimizer]):
    model, optimizer = small_problem(name)
    twin = copy.deepcopy(model)
    arguments = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {"eps": 1e-8}
    reference = peer(build_param_groups(twin, 0.05), lr=0.01, **arguments)
    for _ in range(5):
        backward(model), backward(twin)
        optimizer.step(grad_norm=global_grad_norm(model.parameters()))
        reference.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="lamb, lamb_torch_optimizer, adamw, sgd"):
        build_optimizer(OptimizerConfig(name="adam"), build_param_groups(nn.Linear(1, 1), 0.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resume_has_the_gathered_state_and_its_own_settings(name: str):
    model, optimizer = small_problem(name)
    for _ in range(3):
        backward(model)
        optimizer.step()
    resumed = build_optimizer(
        OptimizerConfig(name=name, lr=0.02, betas=(0.8, 0.9), momentum=0.5), build_param_groups(model, 0.9)
    )
    own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in resumed.param_groups]
    load_optimizer_state(resumed, copy.deepcopy(optimizer.state_dict()))
    assert [{k: v for k, v in g.items() if k not in ("params", "step")} for g in resumed.param_groups] == own
    assert [g["weight_decay"] for g in resumed.param_groups] == [0.9, 0.0]
    before, after = optimizer.state_dict(), resumed.state_dict()
    for a, b in zip(before["param_groups"], after["param_groups"], strict=True):
        assert a.get("step") == b.get("step"), "how many steps are behind it is no setting"
    for index, gathered in before["state"].items():
        for key, value in gathered.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][key])), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resume_in_another_memory_format_takes_the_same_step(name: str):
    def network() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        cfg = OptimizerConfig(name=name, lr=0.01)
        return model, build_optimizer(cfg, build_param_groups(model, 0.05))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.zero_grad()
        images = torch.linspace(-1, 1, 2 * 3 * 25).reshape(2, 3, 5, 5)
        (model(images) - torch.linspace(0, 1, 4)[:, None, None]).square().sum().backward()
        optimizer.step()

    model, optimizer = network()
    for _ in range(2):
        step(model, optimizer)
    other, resumed = network()
    other.to(memory_format=torch.channels_last).load_state_dict(model.state_dict())
    load_optimizer_state(resumed, copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer), step(other, resumed)
    assert other.weight.stride() != model.weight.stride()
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-5, atol=1e-6)
