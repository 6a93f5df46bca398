"""The model zoo: names, sizes, options, and equality with recorded figures of the published network."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from mambavision import VARIANTS, create_model, list_models
from mambavision.models import backbone, fuse_for_inference
from mambavision.models.pretrained import load_weights
from tests.unit.model_samples import micro, relative

EACH_KIND_ONCE = (1, 0, 2, 0)  # blocks: torch.compile takes a second for each kernel
GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED_PARAMS = {
    "mambavision_t": (31_794_248, 252),
    "mambavision_t2": (35_104_008, 298),
    "mambavision_s": (50_140_584, 285),
    "mambavision_b": (97_685_288, 356),
    "mambavision_b_21k": (97_685_288, 356),
    "mambavision_l": (227_961_048, 356),
    "mambavision_l_21k": (227_961_048, 356),
    "mambavision_l2": (241_554_824, 389),
    "mambavision_l2_512_21k": (241_554_824, 389),
    "mambavision_l3_256_21k": (739_570_472, 601),
    "mambavision_l3_512_21k": (739_570_472, 601),
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_parameter_counts_are_the_published_ones_to_the_unit(name):
    with torch.device("meta"):
        model = create_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, len(model.state_dict())) == PUBLISHED_PARAMS[name]
    assert VARIANTS[name].params == parameters


def test_counts_of_our_small_variants_are_the_stated_ones():
    for name in set(list_models()) - set(PUBLISHED_PARAMS):
        with torch.device("meta"):
            assert sum(p.numel() for p in create_model(name).parameters()) == VARIANTS[name].params


@pytest.fixture(params=[("micro_64", None), ("micro_ls_72x104", 1e-5)], ids=["whole_windows", "padded_layer_scale"])
def golden(request):
    name, layer_scale = request.param
    figures = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    model = micro(layer_scale=layer_scale)
    load_weights(model, figures["state_dict"])
    return model, figures


def test_evaluation_equals_the_published_network_in_maps_logits_and_gradients(golden):
    model, figures = golden
    model.eval()
    maps = model.forward_features(figures["input"])
    stem, *stages = figures["features"]
    torch.testing.assert_close(model.patch_embed(figures["input"]), stem, rtol=1e-5, atol=1e-6)
    for level, features, expected in zip(model.levels, maps, stages, strict=True):
        assert relative(level.downsample(features), expected) < 1e-5
    logits = model.forward_head(maps)
    assert relative(logits, figures["logits_eval"]) < 1e-5
    F.cross_entropy(logits, figures["target"]).backward()
    assert {name for name, _ in model.named_parameters()} == set(figures["grads_eval"])
    for name, parameter in model.named_parameters():
        expected = figures["grads_eval"][name]
        found = parameter.grad if expected.shape == parameter.shape else parameter.grad.norm()
        assert relative(found, expected) < 1e-5, name


def test_training_equals_the_published_network_in_logits_and_gradient_norms(golden):
    model, figures = golden
    model.train()
    logits = model(figures["input"])
    assert relative(logits, figures["logits_train"]) < 1e-5
    F.cross_entropy(logits, figures["target"]).backward()
    # Biases in front of a batch normalisation have no gradient but rounding: they are compared with the largest one.
    floor = 1e-7 * max(figures["grad_norms_train"].values())
    for name, parameter in model.named_parameters():
        expected = figures["grad_norms_train"][name]
        assert abs(parameter.grad.norm() - expected) <= 1e-5 * abs(expected) + floor, name


def test_channels_last_input_and_weights_change_nothing(golden):
    model, figures = golden
    model.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = model(figures["input"].to(memory_format=torch.channels_last))
    assert relative(logits, figures["logits_eval"]) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 64), (1, 1), (5, 200)])
@pytest.mark.parametrize("padding", ["published", "tight"])
def test_any_input_size_gives_logits_and_maps_at_the_four_strides(size, padding):
    model = micro(window_padding=padding).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, *size)
        assert model(x).shape == (2, 10)
        height, width = (-(-side // 4) for side in size)
        for stage, features in enumerate(model.forward_features(x)):
            assert features.shape == (2, 16 * 2**stage, height, width)
            height, width = -(-height // 2), -(-width // 2)


def test_gradient_checkpointing_changes_no_gradient():
    model, x = micro().train(), torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mambavision_x"}, r"'mambavision_x' does not exist \(nearest: 'mambavision_"),
        ({"depht": (1, 1, 1, 1)}, r"'depht' does not exist \(nearest: 'depths'\)"),
        ({"img_size": 512}, "'img_size' does not exist: images of any size are taken, leave it out"),
        ({"pretrained": True}, "'pretrained' does not exist: weights are taken with checkpoint=PATH"),
        ({"mixer": "gated"}, "mixer 'gated' does not exist; choose one of concat, gate"),
        ({"window_padding": "none"}, "choose one of published, tight"),
        ({"stem_stride": 3}, "choose one of 4, 2, 1"),
        ({"depths": (1, 2, 3)}, "four numbers of blocks"),
        ({"depths": "1238"}, "must be a list of whole numbers"),
        ({"num_heads": (8, 7)}, "640 channels wide, which 7 heads do not divide; nearest: 8"),
        ({"stage_pattern": "MMSS"}, "stage 3 has 8 blocks and wants 8 letters.*MMMMSSSS"),
        ({"stage_pattern": "MMMMSSSX"}, "wants 8 letters, M .mixer. or S"),
        ({"drop_path": 1.0}, "0 <= drop_path < 1"),
        ({"scan_backend": "numba"}, "choose one of auto, cpu, triton, mamba_ssm"),
    ],
)
def test_a_slip_in_a_name_or_value_is_answered_with_what_to_type(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "mambavision_t", **arguments})


def test_list_models_filters_by_shell_pattern():
    assert "mambavision_nano" in list_models()
    assert list_models("*_512_21k") == ["mambavision_l2_512_21k", "mambavision_l3_512_21k"]


def test_timm_builds_the_same_models_by_the_same_names():
    model = timm.create_model("mambavision_nano", num_classes=10, in_chans=1, drop_path_rate=0.3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert model.levels[3].blocks[-1].drop_path == pytest.approx(0.3)
    assert set(list_models()) <= set(timm.list_models("mambavision*"))
    config = timm.data.resolve_model_data_config(timm.create_model("mambavision_s", depths=(0, 0, 1, 1), dim=8))
    assert (config["crop_pct"], config["interpolation"]) == (0.93, "bicubic")
    with pytest.raises(ValueError, match="nearest: 'depths'"):
        timm.create_model("mambavision_t", depht=(1, 1, 1, 1))


def test_timm_builds_with_all_that_its_own_train_script_passes():
    unset = ("in_chans", "drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps")
    keywords = dict.fromkeys(unset) | {"num_classes": 7, "drop_rate": 0.0, "scriptable": False, "checkpoint_path": ""}
    model = timm.create_model("mambavision_nano", pretrained=False, **keywords)
    assert model.head.out_features == 7
    with pytest.raises(ValueError, match=r"drop_rate=0.1: .* no dropout before its head; use drop_path_rate"):
        timm.create_model("mambavision_nano", drop_rate=0.1)


def test_linear_layers_are_drawn_as_timm_draws_them():
    layer, expected = torch.nn.Linear(64, 33), torch.empty(33, 64)
    torch.manual_seed(5)
    backbone._init_linear(layer)
    torch.manual_seed(5)
    assert torch.equal(layer.weight, timm.layers.trunc_normal_(expected, std=0.02)) and not layer.bias.any()


def test_timm_features_only_gives_the_four_maps():
    model = timm.create_model("mambavision_nano", features_only=True, out_indices=(1, 3))
    stride, widths = VARIANTS["mambavision_nano"].stem_stride, model.feature_info.channels()
    assert model.feature_info.reduction() == [2 * stride, 8 * stride]
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (width, 64 // reduction, 64 // reduction) for width, reduction in zip(widths, model.feature_info.reduction())
    ]


def test_stages_and_pools_that_do_not_exist_are_refused():
    for indices in (0, 5):
        with pytest.raises(ValueError, match=f"the last {indices} of the stages do not exist"):
            micro().forward_intermediates(torch.randn(1, 3, 32, 32), indices=indices)
    with pytest.raises(ValueError, match="global_pool 'max': MambaVision pools by the average"):
        micro().reset_classifier(3, global_pool="max")


def test_reset_classifier_gives_a_fresh_head_or_none():
    model = micro().eval()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 128)


@pytest.mark.parametrize("scales", [{}, {"layer_scale": 0.7, "layer_scale_conv": 0.4}], ids=["plain", "layer_scale"])
def test_the_model_fused_for_inference_is_equal_and_leaves_the_original_alone(scales):
    model, x = micro(**scales).train(), torch.randn(4, 3, 64, 64)
    for _ in range(3):
        model(x)  # running statistics worth folding
    torch.nn.init.normal_(model.norm.weight)
    torch.nn.init.normal_(model.norm.bias)
    model.eval()
    fused = fuse_for_inference(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        assert relative(fused(x), model(x)) < 1e-5
        half = fuse_for_inference(model, torch.bfloat16)
        assert half.head.weight.dtype == torch.bfloat16
        assert half(x).dtype == torch.bfloat16 and relative(half(x).float(), model(x)) < 0.03
    assert all(p.requires_grad for p in model.parameters()) and isinstance(model.norm, torch.nn.BatchNorm2d)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["concat", "gate"])
def test_the_whole_training_step_compiles_without_a_graph_break_and_equals_eager(mixer):
    model, x = micro(mixer=mixer, layer_scale=0.5, depths=EACH_KIND_ONCE).train(), torch.randn(4, 3, 64, 64)
    target = torch.arange(4)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(run(x).float(), target)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 0.05


@pytest.mark.slow
def test_the_compiled_forward_equals_eager_to_rounding_at_another_size_too():
    model = micro(depths=EACH_KIND_ONCE).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for size in (64, 72):
            x = torch.randn(2, 3, size, size)
            assert relative(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_model_without_a_head_runs_in_half_precision(dtype: torch.dtype):
    model = micro(num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole, half = model(images), fuse_for_inference(model, dtype)(images).float()
    assert relative(half, whole) < 0.03
