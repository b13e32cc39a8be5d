"""Counter-based random numbers: a draw is a function of (seed, position, purpose, draw, index) and of nothing else.

Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in integer tensor arithmetic, so
the bits are the same on every device, for every batch size, batch order and number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    SAMPLE = 0      # Gumbel noise that picks a code
    ACCEPT = 1      # acceptance tests
    RESIDUAL = 2    # draws from a residual law
    DRAFT = 3       # initial drafts
    HEAD = 4        # diffusion-head steps
    FLOW = 5        # starting noise of flows and one-step students
    ORDER = 6       # generation orders
    TEXT = 7        # null captions made from a seed
    AUDIT = 8       # randomised ranks of an audit
    POSTERIOR = 9   # samples of an autoencoder's posterior


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64 tensors in [0, 2**32)) for broadcastable counter and key words."""
    c0, c1, c2, c3 = counter
    rounds = torch.arange(_ROUNDS, device=c0.device).view(-1, *[1] * c0.ndim)
    keys = zip(*((word + rounds * step).unbind() for word, step in zip(key, _WEYL)))
    for k0, k1 in keys:
        # c1, c3 and the shifted products carry bits above 32 that mean nothing, until the mask
        low0, low1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((low >> 32).bitwise_xor_(word).bitwise_xor_(k).bitwise_and_(_MASK)
                  for low, word, k in ((low1, c1, k0), (low0, c3, k1)))
        c1, c3 = low1, low0
    return c0, c1 & _MASK, c2, c3 & _MASK


@dataclass(frozen=True)
class CounterNoise:
    """The random source of every decoder. `seeds_B` (int64): one per image; `positions_BW` (int64): token positions."""

    def words(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) int64 words in [0, 2**32)."""
        blocks = torch.arange((count + 3) // 4, device=positions_BW.device)
        zero = torch.zeros_like(positions_BW)[..., None]
        counter = (blocks + zero, positions_BW[..., None] + 0 * blocks, zero + (int(purpose) & _MASK) + 0 * blocks,
                   zero + (draw & _MASK) + 0 * blocks)
        seeds = seeds_B.to(positions_BW.device)[:, None, None]
        words = philox(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
        return torch.stack(words, dim=-1).flatten(-2)[..., :count]

    def uniform(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) float32 in (0, 1]; values near 0 keep 32 bits of resolution."""
        return self.words(seeds_B, positions_BW, count, purpose, draw).float().add_(0.5).mul_(2.0 ** -32)

    def gumbel(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose = Purpose.SAMPLE,
               draw: int = 0) -> Tensor:
        """(B, W, count) standard Gumbel, float32: -log(E) with E = -log(1 - u), exact to 32 bits in the upper tail."""
        uniform = self.uniform(seeds_B, positions_BW, count, purpose, draw).clamp_max_(1 - 2.0 ** -24)
        return uniform.neg_().log1p_().neg_().log_().neg_()

    def categorical(self, p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.SAMPLE,
                    draw: int = 0) -> Tensor:
        """codes_BW drawn from the laws p_BWV: argmax(log p + Gumbel), so equal keys share their noise across laws."""
        return (p_BWV.log() + self.gumbel(seeds_B, positions_BW, p_BWV.shape[-1], purpose, draw)).argmax(-1)

    def bernoulli(self, p_BW: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.ACCEPT,
                  draw: int = 0) -> Tensor:
        """Bool (B, W), True with probability min(1, p)."""
        return self.uniform(seeds_B, positions_BW, 1, purpose, draw)[..., 0] <= p_BW

    def normal(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) standard normal, float32, by Box and Muller."""
        u1, u2 = self.uniform(seeds_B, positions_BW, 2 * count, purpose, draw).unflatten(-1, (count, 2)).unbind(-1)
        return torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * torch.pi * u2)
