"""What the network is made of: windows, attention, mixers, stochastic depth, layer scales, initialisation."""

import pytest
import torch
import torch.nn.functional as F

from mambavision import create_model
from mambavision.models.attention import attend_by_products
from mambavision.models.blocks import add_branch, cut_windows, join_windows, window_grid
from tests.unit.model_samples import MICRO, micro, relative


def test_tight_windows_equal_the_published_ones_where_no_padding_is_needed():
    model = micro().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        published = model(x)
        for level in model.levels:
            level.window_padding = "tight"
        torch.testing.assert_close(model(x), published)


def test_a_map_smaller_than_its_window_is_padded_as_published_and_not_when_tight():
    assert window_grid(10, 6, 14, "published") == (1, 1, 14, 14)
    assert window_grid(10, 6, 14, "tight") == (1, 1, 10, 6)
    assert window_grid(21, 14, 14, "tight") == (2, 1, 11, 14)
    assert window_grid(50, 84, 112, "tight") == (1, 1, 50, 84)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 3), (16, 4)])
@pytest.mark.parametrize("padding", ["published", "tight"])
def test_windows_joined_again_give_the_map(size, padding):
    x = torch.randn(2, 5, *size)
    grid = window_grid(*size, 4, padding)
    tokens = cut_windows(x, grid)
    assert tokens.shape == (2 * grid[0] * grid[1], grid[2] * grid[3], 5)
    torch.testing.assert_close(join_windows(tokens, grid, *size), x, rtol=0, atol=0)


def test_a_single_window_of_a_channels_last_map_is_cut_and_joined_without_a_copy():
    x = torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last)
    grid = window_grid(4, 4, 4, "published")
    tokens = cut_windows(x, grid)
    assert tokens.data_ptr() == x.data_ptr() == join_windows(tokens, grid, 4, 4).data_ptr()


def test_attention_by_products_equals_the_fused_one_in_value_and_gradient():
    qkv = torch.randn(3, 2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    found = attend_by_products(qkv)
    expected = F.scaled_dot_product_attention(*qkv.unbind(0))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * direction).sum(), qkv)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_drop_path_keeps_the_mean_and_drops_whole_rows_by_the_seed():
    x, branch = torch.zeros(4000, 2, 3), torch.ones(4000, 2, 3)
    torch.manual_seed(1)
    dropped = add_branch(x, branch, None, 0.25)
    torch.manual_seed(1)
    torch.testing.assert_close(add_branch(x, branch, None, 0.25), dropped, rtol=0, atol=0)
    rows = dropped.flatten(1)
    assert ((rows == 0).all(1) | (rows == 1 / 0.75).all(1)).all()
    assert abs(dropped.mean() - 1) < 0.03
    gamma = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(add_branch(x, branch, gamma, 0.0), x + gamma * branch)


def test_stochastic_depth_rises_linearly_over_all_blocks_of_all_stages():
    model = create_model("mambavision_t", **MICRO, drop_path=0.6)
    rates = [block.drop_path for level in model.levels for block in level.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.6, 7))


def test_mixers_come_first_and_the_pattern_can_be_said_otherwise():
    def pattern(model):
        return ["".join("M" if hasattr(b.mixer, "in_proj") else "S" for b in lv.blocks) for lv in model.levels[2:]]

    assert pattern(micro()) == ["MMS", "MS"]
    assert pattern(micro(stage_pattern="SMS")) == ["SMS", "MS"]
    assert pattern(micro(stage_pattern="SMM/SM")) == ["SMM", "SM"]
    assert pattern(micro(stage_pattern=["S", "S"])) == ["SSS", "SS"]


@pytest.mark.parametrize("mixer", ["concat", "gate", "no_z_conv", "causal_no_z_conv", "no_ssm"])
def test_every_mixer_of_the_ablation_trains(mixer):
    model = micro(mixer=mixer).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert any("A_log" in name for name, _ in model.named_parameters()) == (mixer != "no_ssm")


def test_a_causal_mixer_does_not_see_later_tokens_and_the_published_one_does():
    for mixer, sees in (("causal_no_z_conv", False), ("concat", True)):
        layer = micro(mixer=mixer).levels[2].blocks[0].mixer
        tokens = torch.randn(1, 9, 64)
        later = tokens.clone()
        later[:, 5:] += 1
        with torch.no_grad():
            assert torch.equal(layer(tokens)[:, :5], layer(later)[:, :5]) != sees


def test_initialisation_published_starts_the_step_at_ln2_and_mamba_in_its_range():
    def first_steps(init):
        layer = micro(init=init).levels[2].blocks[0].mixer
        return layer.dt_proj.weight.std().item(), F.softplus(2 * layer.dt_proj.bias)

    std, steps = first_steps("published")
    assert abs(std - 0.02) < 0.004 and torch.all(steps == F.softplus(torch.tensor(0.0)))
    std, steps = first_steps("mamba")
    assert std > 0.1 and steps.min() > 0.99e-3 and steps.max() < 0.101


def test_layer_scales_start_where_they_are_told_and_exist_only_then():
    scaled = micro(layer_scale=1e-3, layer_scale_conv=0.5)
    gammas = {name: p for name, p in scaled.named_parameters() if "gamma" in name}
    assert len(gammas) == 2 * 5 + 2
    assert all(torch.all(p == (1e-3 if "gamma_" in name else 0.5)) for name, p in gammas.items())
    assert not any("gamma" in name for name, _ in micro().named_parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1e-2])
def test_what_a_block_with_layer_scales_adds_is_not_lost_to_autocast(training: bool, scale: float):
    """Published, the scale promotes the residual stream to float32; a bfloat16 one keeps 8 bits of x, and of 1e-5 nothing."""
    block = micro(layer_scale=scale).levels[2].blocks[0].train(training)
    tokens = torch.randn(2, 16, block.norm1.normalized_shape[0])
    added = block(tokens).detach() - tokens
    with torch.autocast("cpu", torch.bfloat16):
        result = block(tokens.bfloat16())
    assert result.dtype == torch.float32
    assert relative(result.detach() - tokens.bfloat16(), added) < 0.03
