"""How a diffusion or flow head reads its time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from arimg.models.layers import at_least_float32

TIME_FEATURES, MAX_PERIOD = 256, 10000.0
_ROUNDED_UP = (12, 106)     # of the frequencies in float32, see `frequencies`


def frequencies(dtype: torch.dtype) -> Tensor:
    """From 1 down to 1 / MAX_PERIOD, the same on every processor.

    torch's exp in float32 is not: it differs in a last bit here and there, which is 3e-5 of a feature at t = 999. These
    are the bits of a processor without Intel's vector code: two exact values lie 0.48 of a last bit above the number
    below and go up.
    """
    exponents = -math.log(MAX_PERIOD) * torch.arange(TIME_FEATURES // 2, dtype=dtype) / (TIME_FEATURES // 2)
    values = torch.exp(exponents.double()).to(dtype)
    if dtype == torch.float32:
        for k in _ROUNDED_UP:
            values[k] = torch.nextafter(values[k], torch.ones(()))
    return values


def time_features(t_N: Tensor) -> Tensor:
    """(N, TIME_FEATURES): cosines, then sines, of t times the frequencies, float32 at least."""
    t_N = at_least_float32(t_N)
    angles = t_N[..., None] * frequencies(t_N.dtype).to(t_N.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoidal features through a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_N: Tensor) -> Tensor:
        """(N, width)."""
        return self.mlp(time_features(t_N).to(next(self.parameters()).dtype))
