"""Fused token blocks against the plain ones: same function, bfloat16's rounding, any number of threads and windows."""

from __future__ import annotations

import copy

import pytest
import torch

import mambavision
from mambavision.models import fuse_for_inference
from mambavision.models.attention import Attention
from mambavision.models.blocks import TokenBlock
from mambavision.models.mixer import MambaVisionMixer
from mambavision.models.packed_tokens import PackedTokenBlock, supports
from mambavision.ops.token_inference import token_inference_available

needs_matrix_units = pytest.mark.skipif(
    not token_inference_available(), reason="no compiler, or no bfloat16 matrix units here"
)


def block_of(kind: str, dim: int, heads: int = 4) -> TokenBlock:
    torch.manual_seed(0)
    mixer = MambaVisionMixer(dim) if kind == "mixer" else Attention(dim, heads)
    block = TokenBlock(dim, mixer, mlp_ratio=4, drop_path=0.0, layer_scale=None).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
        if not any(parameter is kept for kept in (getattr(mixer, "A_log", None), getattr(mixer, "D", None))):
            parameter.copy_(parameter.bfloat16())  # so that only the arithmetic differs
    return block


@needs_matrix_units
@pytest.mark.parametrize("kind", ["mixer", "attention"])
@pytest.mark.parametrize(("windows", "tokens", "dim"), [(3, 49, 64), (2, 196, 96), (7, 17, 128), (5, 1, 160)])
def test_a_packed_block_is_the_plain_one_within_bfloat16(kind: str, windows: int, tokens: int, dim: int):
    block = block_of(kind, dim)
    tokens = torch.randn(windows, tokens, dim).bfloat16()
    reference = copy.deepcopy(block).double()
    packed = PackedTokenBlock(block)
    with torch.inference_mode():
        wanted, got = reference(tokens.double()), packed(tokens)
    # The residual stream is rounded twice, and what is added to it a few times on the way.
    error = (got.double() - wanted).abs()
    assert error.mean() < 2**-9 * wanted.abs().mean() * 2
    assert error.max() < 2**-8 * wanted.abs().max() * 3


@needs_matrix_units
@pytest.mark.parametrize("kind", ["mixer", "attention"])
def test_neither_threads_nor_neighbours_change_a_bit(kind: str):
    packed, tokens = PackedTokenBlock(block_of(kind, 64)), torch.randn(9, 49, 64).bfloat16()
    before = torch.get_num_threads()
    results = []
    with torch.inference_mode():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed.mlp(packed.mixer(tokens)))
        torch.set_num_threads(before)
        alone = packed.mlp(packed.mixer(tokens[4:5]))
    assert all(torch.equal(results[0], result) for result in results)
    assert torch.equal(results[0][4:5], alone)


@needs_matrix_units
def test_a_nan_stays_in_its_window():
    packed, tokens = PackedTokenBlock(block_of("attention", 64)), torch.randn(4, 20, 64).bfloat16()
    tokens[1, 3, 5] = float("nan")
    with torch.inference_mode():
        finite = packed.mlp(packed.mixer(tokens)).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True, True]


@needs_matrix_units
def test_fewer_windows_than_threads_are_shared_out_by_the_plain_layers():
    before = torch.get_num_threads()
    block = block_of("mixer", 64)
    packed, tokens = PackedTokenBlock(copy.deepcopy(block).bfloat16()), torch.randn(1, 49, 64).bfloat16()
    torch.set_num_threads(2)
    with torch.inference_mode():
        few = packed(tokens)
        torch.set_num_threads(1)
        torch.testing.assert_close(few, packed(tokens), atol=0.03, rtol=0.03)
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_fused_model_has_packed_blocks_where_they_run_and_agrees_with_its_origin():
    torch.manual_seed(0)
    model = mambavision.create_model("mambavision_t", num_classes=10).eval()
    fused = fuse_for_inference(model, torch.bfloat16)
    kinds = {type(block) for level in fused.levels[2:] for block in level.blocks}
    assert kinds == ({PackedTokenBlock} if token_inference_available() else {TokenBlock})
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted, got = model(images), fused(images)
    torch.testing.assert_close(got.float(), wanted, atol=0.03, rtol=0.03)


@needs_matrix_units
def test_it_says_that_there_is_no_backward_and_what_it_takes():
    packed = PackedTokenBlock(block_of("attention", 64))
    with pytest.raises(RuntimeError, match="has no backward; use the model it was made from"):
        packed.mlp(torch.randn(2, 4, 64).bfloat16().requires_grad_())
    with pytest.raises(ValueError, match="takes bfloat16 tokens"):
        packed.mlp(torch.randn(2, 4, 64))


def test_other_mixers_and_odd_widths_stay_as_they_are():
    assert not supports(TokenBlock(64, MambaVisionMixer(64, kind="no_ssm"), mlp_ratio=4, drop_path=0, layer_scale=None))
    assert not supports(TokenBlock(40, Attention(40, 4), mlp_ratio=4, drop_path=0, layer_scale=None))
    assert not supports(TokenBlock(64, Attention(64, 4), mlp_ratio=4, drop_path=0, layer_scale=1e-5))
