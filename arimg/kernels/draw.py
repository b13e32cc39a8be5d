"""Draws from laws over codes by draw.cpp. Letters: B images, W positions, V codes."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Tell torch.compile the shape of the result. Called once, after the build."""
    torch.library.register_fake("arimg::categorical", _shape)


def draw_categorical(p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: int, draw: int) -> Tensor:
    """codes_BW of laws in float32 on a CPU; see CounterNoise.categorical. Laws, seeds and positions broadcast."""
    if not p_BWV.shape[:2] == positions_BW.shape == (len(seeds_B), positions_BW.shape[1]):
        batch, width = torch.broadcast_shapes(p_BWV.shape[:2], positions_BW.shape, (len(seeds_B), 1))
        p_BWV, positions_BW = p_BWV.expand(batch, width, -1), positions_BW.expand(batch, width)
        seeds_B = seeds_B.expand(batch)
    codes_BW: Tensor = torch.ops.arimg.categorical(p_BWV.contiguous(), seeds_B.contiguous(), positions_BW.contiguous(),
                                                   purpose, draw)
    return codes_BW


def _shape(p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: int, draw: int) -> Tensor:
    return torch.empty_like(positions_BW)
