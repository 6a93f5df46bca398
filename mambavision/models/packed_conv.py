"""The convolutional half of a fused model, each block, stem and downsampling one or two operators (bfloat16, CPU, inference).

Made from modules whose normalisations and scales are folded into the convolutions already.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambavision.models.backbone import Downsample, PatchEmbed
from mambavision.models.blocks import ConvBlock
from mambavision.ops.conv_inference import conv_inference_available, pack_filter


class PackedConvBlock(nn.Module):
    """x + conv2(gelu_tanh(conv1(x))); the intermediate map is rounded to bfloat16 and never leaves the cache."""

    @classmethod
    def of(cls, block: ConvBlock) -> PackedConvBlock:
        assert supports(block)
        packed = cls()
        for name, conv in (("first", block.conv1), ("second", block.conv2)):
            _keep(packed, name, conv)
        return packed

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W), bfloat16
        return torch.ops.mambavision.conv_block_inference(
            x, self.first, self.first_bias.float(), self.second, self.second_bias.float()
        )


class PackedPatchEmbed(nn.Module):
    """The stem. Takes images of any layout, float32 or bfloat16."""

    @classmethod
    def of(cls, stem: PatchEmbed) -> PackedPatchEmbed:
        assert supports(stem)
        packed = cls()
        first, _, _, second, _, _ = stem.conv_down
        packed.strides = first.stride[0], second.stride[0]
        _keep(packed, "first", first)
        _keep(packed, "second", second)
        return packed

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W)
        conv = torch.ops.mambavision.conv_inference
        x = conv(x, self.first, self.first_bias.float(), self.strides[0], True)
        return conv(x, self.second, self.second_bias.float(), self.strides[1], True)


class PackedDownsample(nn.Module):
    """3x3 convolution of stride 2 that doubles the width."""

    @classmethod
    def of(cls, downsample: Downsample) -> PackedDownsample:
        assert supports(downsample)
        packed = cls()
        _keep(packed, "weight", downsample.reduction[0])
        return packed

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W), bfloat16
        return torch.ops.mambavision.conv_inference(x, self.weight, self.weight_bias.float(), 2, False)


def supports(module: nn.Module) -> bool:
    """Whether there is a packed form of it here: kernels and processor permitting, any width, nothing left to fold."""
    if isinstance(module, ConvBlock):
        folded = (
            isinstance(module.norm1, nn.Identity) and isinstance(module.norm2, nn.Identity) and module.gamma is None
        )
    elif isinstance(module, PatchEmbed):
        folded = isinstance(module.conv_down[1], nn.Identity) and isinstance(module.conv_down[4], nn.Identity)
    else:
        folded = isinstance(module, Downsample)
    return folded and conv_inference_available()


def _keep(module: nn.Module, name: str, conv: nn.Conv2d) -> None:
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().float().clone()
    module.register_buffer(name, pack_filter(conv.weight))
    module.register_buffer(f"{name}_bias", bias)
