"""The parts of a stage: convolution block, token block (mixer or attention, then MLP), windows, stochastic depth."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops.gelu import gelu


class ConvBlock(nn.Module):
    """x + dp(gamma * BN(conv(GELU(BN(conv(x)))))), stages 1 and 2."""

    def __init__(self, dim: int, *, drop_path: float, layer_scale: float | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-5)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-5)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        branch = gelu(conv_batch_norm(self.conv1, self.norm1, x), approximate="tanh")
        branch = conv_batch_norm(self.conv2, self.norm2, branch)
        gamma = None if self.gamma is None else self.gamma.view(-1, 1, 1)
        return add_branch(x, branch, gamma, self.drop_path if self.training else 0.0)


def conv_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)). In training the convolution's bias is not added, as the batch mean takes it out again.

    It still moves the running mean. Its gradient is then exactly zero, where summing the activations' gradients would
    leave rounding noise, which an Adam-like optimizer blows up to full steps that differ with the order of summation.
    """
    if not isinstance(norm, nn.BatchNorm2d) or not norm.training or conv.bias is None:
        return norm(conv(x))
    with torch.no_grad():
        # batch_norm keeps 1 - momentum of this and adds momentum * mean: what it would have been with the bias.
        norm.running_mean.add_(conv.bias, alpha=norm.momentum / (1.0 - norm.momentum))
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        F.conv2d(x, conv.weight, None, conv.stride, conv.padding),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias + 0.0 * conv.bias,  # so that the bias has a gradient, which DDP waits for
        training=True,
        momentum=norm.momentum,
        eps=norm.eps,
    )


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(tokens)))


class TokenBlock(nn.Module):
    """x + dp(gamma_1 * mixer(LN(x))), then x + dp(gamma_2 * mlp(LN(x))), on the tokens of windows (b, L, C)."""

    def __init__(
        self, dim: int, mixer: nn.Module, *, mlp_ratio: float, drop_path: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        drop_path = self.drop_path if self.training else 0.0
        tokens = add_branch(tokens, self.mixer(self.norm1(tokens)), self.gamma_1, drop_path)
        return add_branch(tokens, self.mlp(self.norm2(tokens)), self.gamma_2, drop_path)


def add_branch(x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: float) -> Tensor:
    """x + keep/(1 - drop_path) * gamma * branch in one pass over memory.

    `keep` is drawn for each row of the batch from the default generator of the device (Huang et al., 2016).
    """
    if drop_path == 0.0 and gamma is None:
        return x + branch
    scale = None if gamma is None else gamma.to(branch.dtype)
    if drop_path > 0.0:
        keep = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(1.0 - drop_path)
        keep = keep / (1.0 - drop_path)
        scale = keep if scale is None else keep * scale
    return torch.addcmul(x, branch, scale)


def window_grid(height: int, width: int, window: int, padding: str) -> tuple[int, int, int, int]:
    """Windows down and across, and the height and width of one, for a map of (height, width) tokens.

    "published": windows are always `window` square and the map is padded up to a multiple of it, even where it is
    smaller than one window. "tight": as many windows, each only as large as they must be to cover the map.
    """
    down, across = math.ceil(height / window), math.ceil(width / window)
    if padding == "tight":
        return down, across, math.ceil(height / down), math.ceil(width / across)
    return down, across, window, window


def cut_windows(x: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """(B, C, H, W) -> (B * windows, tokens, C), windows and tokens row by row, zero-padded at the right and bottom.

    A view where one window holds the whole map and the map is channels-last.
    """
    down, across, window_h, window_w = grid
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    pad_h, pad_w = down * window_h - height, across * window_w - width
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    if down * across > 1:
        x = x.reshape(batch, down, window_h, across, window_w, channels).transpose(2, 3)
    return x.reshape(batch * down * across, window_h * window_w, channels)


def join_windows(tokens: Tensor, grid: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    """Inverse of cut_windows: the map (B, C, height, width), channels-last in memory, padding dropped."""
    down, across, window_h, window_w = grid
    channels = tokens.shape[-1]
    x = tokens.reshape(-1, down, across, window_h, window_w, channels)
    if down * across > 1:
        x = x.transpose(2, 3)
    x = x.reshape(-1, down * window_h, across * window_w, channels)
    return x[:, :height, :width].permute(0, 3, 1, 2)
