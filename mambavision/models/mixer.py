"""The MambaVision mixer: two convolution branches, a selective scan over one of them, concatenated.

Source: arXiv 2407.08083, section 3 and algorithm 1; the forms of its ablation table are here as options.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.models.options import MIXERS
from mambavision.ops import selective_scan_tokens
from mambavision.ops.depthwise_conv import conv_silu_split, conv_silu_tokens
from mambavision.ops.training import is_plain, linear, product

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the initial step sizes where init is "mamba"


class MambaVisionMixer(nn.Module):
    """Token mixer on (b, L, C), tokens-major from end to end."""

    def __init__(
        self, dim: int, *, kind: str = "concat", state_size: int = 8, conv_size: int = 3, scan_backend: str = "auto"
    ) -> None:
        super().__init__()
        assert dim % 2 == 0 and conv_size == 3 and kind in MIXERS
        half = dim // 2
        self.half, self.state_size, self.dt_rank = half, state_size, math.ceil(dim / 16)
        self.kind, self.scan_backend = kind, scan_backend
        self.convolves_z = kind not in ("no_z_conv", "causal_no_z_conv")
        self.concatenates = kind in ("concat", "no_ssm")
        self.in_proj = nn.Linear(dim, dim, bias=False)
        if kind != "no_ssm":
            self.x_proj = nn.Linear(half, self.dt_rank + 2 * state_size, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, half, bias=True)
            self.A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1).float()).repeat(half, 1))
            self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(dim if self.concatenates else half, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, conv_size, padding="same", groups=half, bias=False)
        if self.convolves_z:
            self.conv1d_z = nn.Conv1d(half, half, conv_size, padding="same", groups=half, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (b, L, C) -> (b, L, C)
        projected = linear(tokens, self.in_proj)
        if self.convolves_z and is_plain(self.conv1d_x, nn.Conv1d) and is_plain(self.conv1d_z, nn.Conv1d):
            x, z = conv_silu_split(projected, self.conv1d_x.weight, self.conv1d_z.weight)
        elif self.convolves_z:
            x, z = projected.transpose(1, 2).split(self.half, dim=1)
            x, z = (F.silu(y).transpose(1, 2).contiguous() for y in (self.conv1d_x(x), self.conv1d_z(z)))
        else:
            x, z = projected.split(self.half, dim=-1)
            x = conv_silu_tokens(x, self.conv1d_x.weight, causal=self.kind == "causal_no_z_conv")
            z = F.silu(z)
        y = x if self.kind == "no_ssm" else self._scan(x)
        return linear(torch.cat((y, z), dim=-1) if self.concatenates else y * z, self.out_proj)

    def _scan(self, x: Tensor) -> Tensor:
        dt, B, C = linear(x, self.x_proj).split((self.dt_rank, self.state_size, self.state_size), dim=-1)
        # The published network adds the bias in dt_proj and once more inside the scan: softplus(W dt + 2 b).
        if is_plain(self.dt_proj, nn.Linear):
            delta, bias = product(dt, self.dt_proj.weight), 2.0 * self.dt_proj.bias.float()
        else:
            delta, bias = self.dt_proj(dt) + self.dt_proj(torch.zeros_like(dt[:1, :1])), None
        A = -torch.exp(self.A_log.float())
        return selective_scan_tokens(x, delta, A, B, C, self.D.float(), bias, backend=self.scan_backend)

    def init_step_size(self) -> None:
        """Mamba's initialisation of the step: log-uniform in [DT_MIN, DT_MAX] where W dt is 0.

        The bias is halved because it is added twice.
        """
        if self.kind == "no_ssm":
            return
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(torch.empty(self.half).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        inverse_softplus = dt + torch.log(-torch.expm1(-dt))
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus / 2)
