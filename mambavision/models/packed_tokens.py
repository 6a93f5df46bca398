"""A token block of a fused model whose halves run as one operator each (bfloat16, CPU, inference)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.models.attention import Attention
from mambavision.models.blocks import Mlp, TokenBlock
from mambavision.models.mixer import MambaVisionMixer
from mambavision.ops.token_inference import pack_taps, pack_weight, scan_table, token_inference_available


class PackedTokenBlock(nn.Module):
    """The same function as the block it is made from, whose layer scales must be folded already."""

    def __init__(self, block: TokenBlock) -> None:
        super().__init__()
        assert supports(block)
        # Takes over where there are fewer windows than threads: its layers then share out a window's work.
        self.plain = block
        self.mixer = PackedAttention(block) if isinstance(block.mixer, Attention) else PackedMixer(block)
        self.mlp = PackedMlp(block)

    def forward(self, tokens: Tensor) -> Tensor:  # (windows, L, C), bfloat16
        if tokens.shape[0] < torch.get_num_threads():
            return self.mlp(tokens + self.plain.mixer(self.plain.norm1(tokens)))
        return self.mlp(self.mixer(tokens))


class PackedMlp(nn.Module):
    """x + mlp(LN(x))"""

    def __init__(self, block: TokenBlock) -> None:
        super().__init__()
        self.eps = block.norm2.eps
        self.register_buffer("norm", _norm(block.norm2))
        self.register_buffer("up", pack_weight(block.mlp.fc1.weight))
        self.register_buffer("up_bias", _bias(block.mlp.fc1))
        self.register_buffer("down", pack_weight(block.mlp.fc2.weight))
        self.register_buffer("down_bias", _bias(block.mlp.fc2))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.mambavision.mlp_inference(
            tokens, self.norm, self.eps, self.up, self.up_bias, self.down, self.down_bias
        )


class PackedAttention(nn.Module):
    """x + attention(LN(x))"""

    def __init__(self, block: TokenBlock) -> None:
        super().__init__()
        attention = block.mixer
        self.eps, self.heads = block.norm1.eps, attention.num_heads
        self.register_buffer("norm", _norm(block.norm1))
        self.register_buffer("qkv", pack_weight(attention.qkv.weight))
        self.register_buffer("qkv_bias", _bias(attention.qkv))
        self.register_buffer("proj", pack_weight(attention.proj.weight))
        self.register_buffer("proj_bias", _bias(attention.proj))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.mambavision.attention_inference(
            tokens, self.norm, self.eps, self.qkv, self.qkv_bias, self.proj, self.proj_bias, self.heads
        )


class PackedMixer(nn.Module):
    """x + mixer(LN(x))"""

    def __init__(self, block: TokenBlock) -> None:
        super().__init__()
        mixer = block.mixer
        self.eps, self.states = block.norm1.eps, mixer.state_size
        # x_proj's output is laid out as (dt, zeros, B, C, zeros) in whole cache lines, and feeds dt_proj as it is.
        rank = mixer.dt_rank + -mixer.dt_rank % 32
        dt, states = mixer.x_proj.weight.split((mixer.dt_rank, 2 * mixer.state_size))
        x_proj = torch.cat((F.pad(dt, (0, 0, 0, rank - mixer.dt_rank)), states))
        self.register_buffer("norm", _norm(block.norm1))
        self.register_buffer("in_proj", pack_weight(mixer.in_proj.weight))
        self.register_buffer("taps", pack_taps(mixer.conv1d_x.weight, mixer.conv1d_z.weight))
        self.register_buffer("x_proj", pack_weight(F.pad(x_proj, (0, 0, 0, -x_proj.shape[0] % 32))))
        self.register_buffer("dt_proj", pack_weight(mixer.dt_proj.weight, inner=rank))
        self.register_buffer(
            "table", scan_table(-torch.exp(mixer.A_log.float()), mixer.D, 2 * mixer.dt_proj.bias.float())
        )
        self.register_buffer("out_proj", pack_weight(mixer.out_proj.weight))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.ops.mambavision.mixer_inference(
            tokens,
            self.norm,
            self.eps,
            self.in_proj,
            self.taps,
            self.x_proj,
            self.dt_proj,
            self.table,
            self.out_proj,
            self.states,
        )


def supports(block: TokenBlock) -> bool:
    """Whether the operators run here and cover it: the published mixer or attention, no layer scale left, whole vectors."""
    mixer = block.mixer
    if isinstance(mixer, MambaVisionMixer):
        known, unit = mixer.kind == "concat", 32  # half the width is worked on by itself
    else:
        known, unit = isinstance(mixer, Attention) and mixer.qkv.in_features // mixer.num_heads % 2 == 0, 16
    widths = (block.norm1.normalized_shape[0], block.mlp.fc1.out_features)
    unscaled = block.gamma_1 is None and block.gamma_2 is None
    covered = known and unscaled and type(block.mlp) is Mlp and all(width % unit == 0 for width in widths)
    return covered and token_inference_available()


def _norm(norm: nn.LayerNorm) -> Tensor:
    return torch.stack((norm.weight, norm.bias)).float()


def _bias(layer: nn.Linear) -> Tensor:
    return layer.bias.detach().float().clone()
