"""Packed convolutions: equal to the modules they are made from, computed in float64 from the same rounded weights."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.models.backbone import Downsample, PatchEmbed
from mambavision.models.blocks import ConvBlock
from mambavision.models.packed_conv import PackedConvBlock, PackedDownsample, PackedPatchEmbed, supports
from mambavision.ops.conv_inference import conv_inference_available

pytestmark = pytest.mark.skipif(not conv_inference_available(), reason="no compiler, or no bfloat16 matrix units here")
ROUNDING = 2.0**-8  # half a unit in the last place of bfloat16, and as much again for the intermediate map's
BLOCKS = [
    (5, 32, 7, 5),
    (1, 80, 9, 11),
    (2, 196, 3, 4),
    (1, 48, 1, 1),
    (1, 160, 40, 3),
    (3, 128, 2, 57),
    (2, 16, 70, 33),
]


def rounded(module: nn.Module) -> nn.Module:
    """Random weights of a size that keeps activations near one, as bfloat16 holds them, normalisations gone."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data.mul_(2.0).copy_(part.weight.data.bfloat16())
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.BatchNorm2d):
            module.set_submodule(name, nn.Identity())
    return module.eval().requires_grad_(False)


def block_in_float64(block: ConvBlock, x: Tensor) -> Tensor:
    block = copy.deepcopy(block).double()
    middle = F.gelu(block.conv1(x.double()), approximate="tanh")
    return x.double() + block.conv2(middle.bfloat16().double())


def maps(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def assert_rounded(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=ROUNDING, atol=ROUNDING * expected.std(correction=0).item())


@pytest.mark.parametrize("shape", BLOCKS)
def test_block_equals_float64(shape: tuple[int, int, int, int]):
    block = rounded(ConvBlock(shape[1], drop_path=0.0))
    x = maps(*shape)
    assert_rounded(PackedConvBlock.of(block)(x), block_in_float64(block, x))


def test_without_avx512_results_are_the_same(capsys: pytest.CaptureFixture[str]):
    """On arguments of GELU from its middle to far beyond the last piece of its table."""
    program = """if True:
        import torch
        from mambavision.models.blocks import ConvBlock
        from mambavision.models.packed_conv import PackedConvBlock
        from mambavision.ops.conv_inference import conv_inference_available
        conv_inference_available()
        generator = torch.Generator().manual_seed(0)
        filters = [torch.randn(48, 48, 3, 3, generator=generator) / 5 for _ in range(2)]
        block = ConvBlock(48, drop_path=0.0)
        block.norm1 = block.norm2 = torch.nn.Identity()
        block.conv1.weight.data, block.conv2.weight.data = filters
        block.conv1.bias.data.zero_(), block.conv2.bias.data.zero_()
        x = torch.randn(2, 48, 9, 11, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            y = PackedConvBlock.of(block)(x)
        print(y.float().abs().sum().item())
    """
    exec(program, {})
    here = float(capsys.readouterr().out)
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "MAMBAVISION_ISA": "avx2"}, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) == pytest.approx(here, rel=1e-5)


@pytest.mark.parametrize("shape", BLOCKS)
def test_downsampling_equals_float64(shape: tuple[int, int, int, int]):
    down = rounded(Downsample(shape[1]))
    x = maps(*shape)
    assert_rounded(PackedDownsample.of(down)(x), copy.deepcopy(down).double()(x.double()))


@pytest.mark.parametrize("stride", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stem_takes_images_as_they_come(stride: int, dtype: torch.dtype, layout: torch.memory_format):
    stem = rounded(PatchEmbed(3, 32, 80, stride=stride))
    x = torch.randn(2, 3, 37, 70).to(dtype).contiguous(memory_format=layout)
    first, second = copy.deepcopy(stem).double().conv_down[::3]
    expected = second(first(x.bfloat16().double()).relu().bfloat16().double()).relu()
    assert_rounded(PackedPatchEmbed.of(stem)(x), expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_result_is_the_same_bit_for_bit_at_any_number_of_threads(batch: int):
    block = PackedConvBlock.of(rounded(ConvBlock(48, drop_path=0.0)))
    down = PackedDownsample.of(rounded(Downsample(48)))
    x = maps(batch, 48, 30, 29)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((block(x), down(x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_bad_pixel_stays_under_the_filter():
    down = PackedDownsample.of(rounded(Downsample(48)))
    x = maps(1, 48, 9, 9)
    x[0, 3, 4, 4] = float("nan")
    bad = down(x).isnan()[0].any(0)
    assert bad[2, 2] and bad.sum() == 1


def test_unfolded_modules_are_not_supported():
    assert not supports(ConvBlock(32, drop_path=0.0)) and not supports(PatchEmbed(3, 32, 80, stride=4))


def test_gradients_are_refused_with_advice():
    block = PackedConvBlock.of(rounded(ConvBlock(32, drop_path=0.0)))
    with pytest.raises(RuntimeError, match="no backward"):
        block(maps(1, 32, 4, 4).requires_grad_())


def test_float32_maps_are_refused_with_their_dtype_named():
    block = PackedConvBlock.of(rounded(ConvBlock(32, drop_path=0.0)))
    with pytest.raises(ValueError, match="bfloat16 maps"):
        block(torch.randn(1, 32, 4, 4))


def test_shapes_are_known_to_the_compiler():
    modules = nn.Sequential(
        PackedPatchEmbed.of(rounded(PatchEmbed(3, 32, 48, stride=4))),
        PackedConvBlock.of(rounded(ConvBlock(48, drop_path=0.0))),
        PackedDownsample.of(rounded(Downsample(48))),
    )
    x = torch.randn(2, 3, 45, 31)
    exported = torch.export.export(modules, (x,)).module()
    assert torch.equal(exported(x), modules(x))
