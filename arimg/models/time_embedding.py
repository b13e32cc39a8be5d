"""How a diffusion or flow head reads its time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from arimg.models.layers import at_least_float32

TIME_FEATURES, MAX_PERIOD = 256, 10000.0


def time_features(t_N: Tensor, count: int = TIME_FEATURES) -> Tensor:
    """(N, count): cosines, then sines, of t times frequencies from 1 down to 1 / MAX_PERIOD, float32 at least."""
    t_N = at_least_float32(t_N)
    k = torch.arange(count // 2, dtype=t_N.dtype, device=t_N.device)
    angles = t_N[..., None] * torch.exp(-math.log(MAX_PERIOD) * k / (count // 2))       # MAR's order of rounding
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoidal features through a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_N: Tensor) -> Tensor:
        """(N, width)."""
        return self.mlp(time_features(t_N).to(next(self.parameters()).dtype))
