"""The network: stem, four stages, head. Shapes come from options (`variants.py` has the named sets).

Source: arXiv 2407.08083, figure 2. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambavision.models.attention import Attention
from mambavision.models.blocks import (
    ConvBlock,
    TokenBlock,
    batch_norm,
    conv_batch_norm,
    cut_windows,
    join_windows,
    window_grid,
)
from mambavision.models.mixer import MambaVisionMixer
from mambavision.models.options import ModelOptions
from mambavision.ops.tracing import is_transformed


class MambaVision(nn.Module):
    """Hierarchical vision network: convolutions in stages 1 and 2, mixers and attention over windows in 3 and 4."""

    backbone_is_frozen = False

    def __init__(self, options: ModelOptions, *, num_classes: int = 1000) -> None:
        super().__init__()
        self.options = options
        self.num_classes = num_classes
        self.widths = tuple(options.dim * 2**stage for stage in range(4))
        self.num_features = self.head_hidden_size = self.widths[-1]
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(options.in_chans, options.in_dim, options.dim, stride=options.stem_stride)
        rates = iter(torch.linspace(0, options.drop_path, sum(options.depths), device="cpu").tolist())
        self.levels = nn.ModuleList(
            Stage(stage, width, options, [next(rates) for _ in range(depth)])
            for stage, (width, depth) in enumerate(zip(self.widths, options.depths, strict=True))
        )
        self.norm = nn.BatchNorm2d(self.num_features, eps=1e-5)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": width, "reduction": options.stem_stride * 2**stage, "module": f"levels.{stage}.blocks"}
            for stage, width in enumerate(self.widths)
        ]
        self._initialise(options.init)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Four maps, each stage's output before its downsampling: widths dim..8 dim, strides 4..32 (stem_stride 4)."""
        maps = []
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
            maps.append(x)
            x = level.downsample(x)
        return maps

    def forward_head(self, features: list[Tensor] | Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) from the last of the four maps; with pre_logits the pooled features (B, 8 dim)."""
        last = features if isinstance(features, Tensor) else features[-1]
        pooled = batch_norm(last, self.norm).mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface to the stages' maps. `indices`: which stages, or how many of the last ones; None: all."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: the maps come as NCHW")
        taken = _stage_indices(indices)
        maps = self.forward_features(x)
        chosen = [self.norm(maps[i]) if norm and i == 3 else maps[i] for i in taken]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's interface: drop what the maps of `indices` do not need. Stages stay; the head and its norm go."""
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return _stage_indices(indices)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for so many classes (0: none). global_pool is timm's keyword: None or "avg"."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool {global_pool!r}: MambaVision pools by the average, global_pool='avg'")
        self.num_classes = num_classes
        device, dtype = self.patch_embed.conv_down[0].weight.device, self.patch_embed.conv_down[0].weight.dtype
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype)
            _init_linear(self.head)

    def freeze_backbone(self) -> None:
        """From here on the head alone learns: all else keeps its weights and running statistics, and drops no paths."""
        self.backbone_is_frozen = True
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                # For who moves or averages statistics; in evaluation torch takes those that are there.
                module.track_running_stats = False
        self.train(self.training)

    def train(self, mode: bool = True) -> MambaVision:
        """As nn.Module's; a frozen backbone stays in evaluation."""
        super().train(mode)
        for name, part in self.named_children():
            if self.backbone_is_frozen and name != "head":
                part.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block while training and compute the block again in the backward pass."""
        for level in self.levels:
            level.grad_checkpointing = enable

    def _initialise(self, init: str) -> None:
        """Truncated normal for every linear layer, PyTorch's default for convolutions.

        As published this includes dt_proj, whose step then starts at softplus(0) = 0.69; "mamba" gives it Mamba's.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
        if init == "mamba":
            for module in self.modules():
                if isinstance(module, MambaVisionMixer):
                    module.init_step_size()


class PatchEmbed(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU; the map is `stride` (4, 2 or 1) times smaller than the image."""

    def __init__(self, in_chans: int, in_dim: int, dim: int, *, stride: int) -> None:
        super().__init__()
        strides = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_chans, in_dim, 3, strides[0], 1, bias=False),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, strides[1], 1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not is_transformed():  # vmap knows no channels-last
            # PyTorch's convolutions are several times faster on channels-last maps there, and hand the layout on.
            x = x.contiguous(memory_format=torch.channels_last)
        first, first_norm, _, second, second_norm, _ = self.conv_down
        x = conv_batch_norm(first, first_norm, x, activation="relu")
        return conv_batch_norm(second, second_norm, x, activation="relu")


class Stage(nn.Module):
    """Blocks of one width, and the convolution that leads to the next stage."""

    def __init__(self, index: int, width: int, options: ModelOptions, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.window = options.window_size[index - 2] if index >= 2 else None
        self.window_padding = options.window_padding
        if index < 2:
            blocks = [ConvBlock(width, drop_path=r, layer_scale=options.layer_scale_conv) for r in drop_path_rates]
        else:
            blocks = [
                TokenBlock(
                    width,
                    MambaVisionMixer(width, kind=options.mixer, scan_backend=options.scan_backend)
                    if letter == "M"
                    else Attention(width, options.num_heads[index]),
                    mlp_ratio=options.mlp_ratio,
                    drop_path=rate,
                    layer_scale=options.layer_scale,
                )
                for letter, rate in zip(options.stage_pattern[index - 2], drop_path_rates, strict=True)
            ]
        self.blocks = nn.ModuleList(blocks)
        self.downsample = Downsample(width) if index < 3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); the downsampling is a call of its own."""
        if self.window is None:
            return self._run_blocks(x)
        height, width = x.shape[-2:]
        grid = window_grid(height, width, self.window, self.window_padding)
        return join_windows(self._run_blocks(cut_windows(x, grid)), grid, height, width)

    def _run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block if torch.compiler.is_compiling() else _moving_once(block), x, use_reentrant=False)
            else:
                x = block(x)
        return x


def _moving_once(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The block for `checkpoint`: when it is computed again, its running statistics stay as the first time left them."""
    buffers, computed = list(block.buffers()), False

    def compute(x: Tensor) -> Tensor:
        nonlocal computed
        kept = [buffer.clone() for buffer in buffers] if computed else []
        computed = True
        try:
            return block(x)
        finally:  # checkpoint ends it by an exception as soon as it has what it wants
            for buffer, value in zip(buffers, kept):
                buffer.data.copy_(value)

    return compute


class Downsample(nn.Module):
    """3x3 convolution of stride 2 that doubles the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


@torch.no_grad()
def _init_linear(layer: nn.Linear) -> None:
    # Normal with std 0.02, truncated at +-2, drawn as timm draws it: through the inverse distribution. The bounds cut no more than
    # the infinities at both ends. torch's own trunc_normal_ draws otherwise (in 2.14); this is so that the initial weights
    # depend on the seed only, not on torch's version.
    layer.weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _stage_indices(indices: int | Sequence[int] | None) -> list[int]:
    if indices is None:
        return [0, 1, 2, 3]
    if isinstance(indices, int):
        if not 1 <= indices <= 4:
            raise ValueError(
                f"the last {indices} of the stages do not exist; there are 4, or give a list, e.g. [{indices}]"
            )
        return list(range(4 - indices, 4))
    wrong = [i for i in indices if not -4 <= i < 4]
    if wrong:
        raise ValueError(f"stage {wrong[0]} does not exist; the stages are 0 to 3")
    return [i % 4 for i in indices]
