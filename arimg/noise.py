"""Counter-based random numbers: a draw is a function of (seed, position, purpose, draw, index) and of nothing else.

Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in integer tensor arithmetic, so
the bits are the same on every device, for every batch size, batch order and number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arimg.kernels import is_ready
from arimg.kernels.draw import draw_categorical

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def largest(values_XV: Tensor) -> Tensor:
    """int64 index of the largest of the last axis, the first one of equals. On a CPU by numpy, which takes a tenth of
    torch's time."""
    if values_XV.device.type != "cpu" or values_XV.dtype == torch.bfloat16 or torch.compiler.is_compiling():
        return values_XV.argmax(-1)
    return torch.from_numpy(np.asarray(values_XV.detach().numpy().argmax(-1)))


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


Words = TypeVar("Words", Tensor, NDArray[np.int64])


def philox(even: Words, odd: Words, key: Words) -> tuple[Words, Words]:
    """Words 0 and 2, and words 1 and 3, of each block: 32 bits in int64. Inputs are pairs, (2, ...), that broadcast to
    the output: counter words 0 and 2, counter words 1 and 3, key words 0 and 1."""
    multipliers, weyl = (_like(pair, even) for pair in (_MULTIPLIERS, _WEYL))
    for _ in range(_ROUNDS):
        products = _swapped(even * multipliers)
        even = (products >> 32) ^ odd       # bits above 32 mean nothing, until the mask
        even ^= key
        even &= _MASK
        odd, key = products, key + weyl
    return even, odd & _MASK


def _like(pair: tuple[int, int], words: Words) -> Words:
    """(2, 1, ...) of the kind of `words`; computed where it is needed, as a copy from the host would wait there."""
    shape = (2, *[1] * (words.ndim - 1))
    if isinstance(words, Tensor):
        return (torch.arange(2, device=words.device) * (pair[1] - pair[0]) + pair[0]).view(shape)
    return np.array(pair).reshape(shape)


def _swapped(pair: Words) -> Words:
    return pair.flip(0) if isinstance(pair, Tensor) else pair[::-1]


@dataclass(frozen=True)
class CounterNoise:
    """The random source of every decoder. `seeds_B` (int64): one per image; `positions_BW` (int64): token positions."""

    def words(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) int64 words in [0, 2**32)."""
        blocks_N = torch.arange((count + 3) // 4, device=positions_BW.device)
        seeds_B = seeds_B.to(positions_BW.device)
        even = torch.stack([blocks_N, torch.full_like(blocks_N, purpose)])[:, None, None]
        odd = torch.stack([positions_BW, torch.full_like(positions_BW, draw)])[..., None]
        key = torch.stack([seeds_B & _MASK, (seeds_B >> 32) & _MASK])[..., None, None]
        if positions_BW.device.type == "cpu":       # numpy needs a third of torch's time for small arrays
            even, odd = map(torch.from_numpy, philox(even.numpy(), odd.numpy(), key.numpy()))
        else:
            even, odd = philox(even, odd, key)
        return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1).flatten(-2)[..., :count]

    def uniform(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) float32 in (0, 1]; values near 0 keep 32 bits of resolution."""
        return self.words(seeds_B, positions_BW, count, purpose, draw).float().add_(0.5).mul_(2.0 ** -32)

    def exponential(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) of Exp(1), float32: E = -log(1 - u), exact to 32 bits near 0."""
        uniform = self.uniform(seeds_B, positions_BW, count, purpose, draw).clamp_max_(1 - 2.0 ** -24)
        return uniform.neg_().log1p_().neg_()

    def gumbel(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose = Purpose.SAMPLE,
               draw: int = 0) -> Tensor:
        """(B, W, count) standard Gumbel, float32: -log(E)."""
        return self.exponential(seeds_B, positions_BW, count, purpose, draw).log_().neg_()

    def categorical(self, p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.SAMPLE,
                    draw: int = 0) -> Tensor:
        """codes_BW drawn from the laws p_BWV: argmax(p / E), which is argmax(log p + Gumbel) without logarithms of
        zero, slow on CPUs. Equal keys share their noise across laws."""
        if is_ready("draw") and p_BWV.device.type == "cpu" and p_BWV.dtype == torch.float32:
            return draw_categorical(p_BWV.detach(), seeds_B, positions_BW, purpose, draw)    # the same codes, faster
        return largest(p_BWV / self.exponential(seeds_B, positions_BW, p_BWV.shape[-1], purpose, draw))

    def bernoulli(self, p_BW: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.ACCEPT,
                  draw: int = 0) -> Tensor:
        """Bool (B, W), True with probability min(1, p)."""
        return self.uniform(seeds_B, positions_BW, 1, purpose, draw)[..., 0] <= p_BW

    def normal(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """(B, W, count) standard normal, float32, by Box and Muller."""
        u1, u2 = self.uniform(seeds_B, positions_BW, 2 * count, purpose, draw).unflatten(-1, (count, 2)).unbind(-1)
        return torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * torch.pi * u2)
