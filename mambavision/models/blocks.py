"""The parts of a stage: convolution block, token block (mixer or attention, then MLP), windows, stochastic depth."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops import training
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
        branch = conv_batch_norm(self.conv1, self.norm1, x, activation="gelu_tanh")
        if self.gamma is None:
            return conv_batch_norm(self.conv2, self.norm2, branch, residual=x, drop_path=self._drop_path())
        branch = conv_batch_norm(self.conv2, self.norm2, branch)
        return add_branch(x, branch, self.gamma.view(-1, 1, 1), self._drop_path())

    def _drop_path(self) -> float:
        return self.drop_path if self.training else 0.0


def conv_batch_norm(
    conv: nn.Conv2d,
    norm: nn.Module,
    x: Tensor,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    drop_path: float = 0.0,
) -> Tensor:
    """activation(norm(conv(x))), or residual + dp(norm(conv(x))). activation: none | relu | gelu_tanh.

    In training the convolution's bias is not added, as the batch mean takes it out again. It still moves the running
    mean. Its gradient is then exactly zero, where summing the activations' gradients would leave rounding noise, which an
    Adam-like optimizer blows up to full steps that differ with the order of summation.
    """
    if not _moves_statistics(norm) or not training.is_plain(conv, nn.Conv2d):
        return _activate(norm(conv(x)), activation, residual, drop_path)
    bias = norm.bias
    if conv.bias is not None:
        # batch_norm keeps 1 - momentum of this and adds momentum * mean: what it would have been with the bias. Through
        # .data, as batch_norm itself does not count as a change either: the backward of another forward may be to come.
        norm.running_mean.data.add_(conv.bias.data, alpha=norm.momentum / (1.0 - norm.momentum))
        bias = bias + 0.0 * conv.bias  # so that the bias has a gradient, which DDP waits for
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return batch_norm(y, norm, bias, activation=activation, residual=residual, drop_path=drop_path)


def batch_norm(
    x: Tensor,
    norm: nn.Module,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    drop_path: float = 0.0,
) -> Tensor:
    """activation(norm(x)), or residual + dp(norm(x)); `bias`, in training, in place of norm.bias."""
    if not _moves_statistics(norm):
        return _activate(norm(x), activation, residual, drop_path)
    bias = norm.bias if bias is None else bias
    if norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
    if training.fuses_batch_norm(x, norm, residual):
        scale = None if drop_path == 0.0 else keep_scale(x, drop_path).float().flatten()
        return training.batch_norm(x, norm, bias, activation=activation, residual=residual, drop_path_scale=scale)
    y = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, bias, training=True, momentum=norm.momentum, eps=norm.eps
    )
    return _activate(y, activation, residual, drop_path)


def _moves_statistics(norm: nn.Module) -> bool:
    """Whether it normalises by this batch and moves its statistics by a fixed share, with nothing hooked onto it."""
    return (
        training.is_plain(norm, nn.BatchNorm2d)
        and norm.training
        and norm.running_mean is not None
        and norm.weight is not None
        and norm.momentum is not None
        and norm.momentum < 1.0
    )


def _activate(y: Tensor, activation: str, residual: Tensor | None, drop_path: float) -> Tensor:
    if residual is not None:
        return add_branch(residual, y, None, drop_path)
    if activation == "relu":
        return F.relu(y)
    return gelu(y, approximate="tanh") if activation == "gelu_tanh" else y


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        fused = training.mlp(tokens, self.fc1, self.fc2)
        return self.fc2(gelu(self.fc1(tokens))) if fused is None else fused


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
        tokens, normed = add_layer_norm(tokens, None, None, 0.0, self.norm1)
        tokens, normed = add_layer_norm(tokens, self.mixer(normed), self.gamma_1, drop_path, self.norm2)
        return add_branch(tokens, self.mlp(normed), self.gamma_2, drop_path)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, drop_path: float, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """s = x + dp(gamma * branch), or x where there is no branch, and norm(s); all (b, L, C)."""
    if gamma is not None and branch is not None:
        x, branch = add_branch(x, branch, gamma, drop_path), None
    if training.fuses_layer_norm(x, branch, norm):
        scale = None if branch is None or drop_path == 0.0 else keep_scale(branch, drop_path).float().flatten()
        return training.add_layer_norm(x, branch, norm, scale)
    if branch is not None:
        x = add_branch(x, branch, None, drop_path)
    return x, norm(x)


def add_branch(x: Tensor, branch: Tensor, gamma: Tensor | None, drop_path: float) -> Tensor:
    """x + keep/(1 - drop_path) * gamma * branch in one pass over memory.

    `keep` is drawn for each row of the batch from the default generator of the device (Huang et al., 2016).

    A layer scale keeps its type, and so the sum is float32 under autocast, as published: at its initial 1e-5 a bfloat16
    sum would lose all that the branch adds.
    """
    if drop_path == 0.0 and gamma is None:
        return x + branch
    scale = gamma
    if drop_path > 0.0:
        keep = keep_scale(branch, drop_path, None if gamma is None else gamma.dtype)
        scale = keep if gamma is None else keep * gamma
    return torch.addcmul(x, branch, scale)


def keep_scale(branch: Tensor, drop_path: float, dtype: torch.dtype | None = None) -> Tensor:
    """0 or 1 / (1 - drop_path) for each row of the batch, (b, 1, ..., 1), in the branch's dtype unless another is given."""
    keep = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1), dtype=dtype).bernoulli_(1.0 - drop_path)
    return keep / (1.0 - drop_path)


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
