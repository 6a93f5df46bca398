"""An equal model with less to do at inference: normalisations and scales folded into the weights beside them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mambavision.models import packed_conv, packed_tokens
from mambavision.models.backbone import Downsample, MambaVision, PatchEmbed
from mambavision.models.blocks import ConvBlock, TokenBlock
from mambavision.models.mixer import MambaVisionMixer
from mambavision.ops.training import is_plain

# Parameters the scan reads in float32 whatever the precision of the rest.
_KEPT_FLOAT32 = ("A_log", "D", "dt_proj.bias")
_LAYERS = ("qkv", "proj", "fc1", "fc2", "conv1", "conv2", "conv1d_x", "conv1d_z")  # what adapters take the place of


@torch.no_grad()
def fuse_for_inference(model: MambaVision, dtype: torch.dtype | None = None) -> MambaVision:
    """A copy of the model in evaluation mode that computes the same function.

    Batch normalisations go into the convolution before them (the last one into the head), layer scales into the linear
    layer or convolution before them. With `dtype` (bfloat16, float16) the weights are stored in it, so that nothing
    converts them at every call; the scan's parameters stay float32. Inputs may stay float32: the stem converts them.
    In bfloat16 on a CPU with matrix units (AMX) whole blocks run as one native operator each.

    The copy is for inference: it has no running statistics and no scales, so its state dict loads nowhere else.

    Raises:
        ValueError: a layer is not what the model was built with (an adapter, a parametrisation, a pruned weight).
    """
    _check_plain(model)
    fused = copy.deepcopy(model).eval()
    stem = fused.patch_embed.conv_down
    for conv, norm in ((0, 1), (3, 4)):
        stem[conv], stem[norm] = fuse_conv_bn_eval(stem[conv], stem[norm]), nn.Identity()
    for module in fused.modules():
        if isinstance(module, ConvBlock):
            _fuse_conv_block(module)
        elif isinstance(module, TokenBlock):
            last = module.mixer.out_proj if isinstance(module.mixer, MambaVisionMixer) else module.mixer.proj
            module.gamma_1 = _fold_scale(last, module.gamma_1)
            module.gamma_2 = _fold_scale(module.mlp.fc2, module.gamma_2)
    if isinstance(fused.head, nn.Linear) and isinstance(fused.norm, nn.BatchNorm2d):
        _fold_norm_into_head(fused)
    if dtype is not None:
        fused.patch_embed.register_forward_pre_hook(_InputCast(dtype))
        if dtype == torch.bfloat16 and next(fused.parameters()).device.type == "cpu":
            _pack(fused)
        # A normalisation that is left (there is no head to fold it into) has its running statistics in float32.
        norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
        kept = {id(parameter) for norm in norms for parameter in norm.parameters()}
        for name, parameter in fused.named_parameters():
            if not name.endswith(_KEPT_FLOAT32) and id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)
    return fused.requires_grad_(False)


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = next((k for k in (nn.Linear, nn.Conv2d, nn.Conv1d) if isinstance(module, k)), None)
        changed = kind is not None and not is_plain(module, kind)
        if changed or (name.endswith(_LAYERS) and kind is None):
            raise ValueError(
                f"{name} is a {type(module).__name__} or has hooks, whose effect cannot be folded; merge it into the weights "
                "first (peft: merge_and_unload(); torch: prune.remove, parametrize.remove_parametrizations)"
            )


_PACKED = {
    PatchEmbed: (packed_conv.supports, packed_conv.PackedPatchEmbed.of),
    ConvBlock: (packed_conv.supports, packed_conv.PackedConvBlock.of),
    Downsample: (packed_conv.supports, packed_conv.PackedDownsample.of),
    TokenBlock: (packed_tokens.supports, packed_tokens.PackedTokenBlock),
}


def _pack(model: MambaVision) -> None:
    """Replaces what native operators run as a whole, where this machine has the matrix units for them."""
    for name, module in list(model.named_modules()):
        supports, packed = _PACKED.get(type(module), (None, None))
        if supports is not None and supports(module):
            model.set_submodule(name, packed(module))


class _InputCast:
    """Brings images to the dtype of the weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(self.dtype), *inputs[1:])


def _fuse_conv_block(block: ConvBlock) -> None:
    block.conv1, block.norm1 = fuse_conv_bn_eval(block.conv1, block.norm1), nn.Identity()
    block.conv2, block.norm2 = fuse_conv_bn_eval(block.conv2, block.norm2), nn.Identity()
    block.gamma = _fold_scale(block.conv2, block.gamma)


def _fold_scale(layer: nn.Linear | nn.Conv2d, scale: Tensor | None) -> None:
    """scale * (W x + b) as one layer. Returns None, what is left of the scale."""
    if scale is not None:
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale)


def _fold_norm_into_head(model: MambaVision) -> None:
    """The mean of a normalised map is the normalised mean: W (s m + t) + b = (W s) m + (W t + b)."""
    norm = model.norm
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    model.head.bias.add_(model.head.weight @ shift)
    model.head.weight.mul_(scale)
    model.norm = nn.Identity()
