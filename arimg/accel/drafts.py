"""First drafts for positions that no pass has judged yet. Later drafts come from the passes themselves.

A draft that a ratio test will judge needs the law it was drawn from: the true one where it is known, else certainty of
the drafted code, which is exact too and accepts less (sjd.md names both; published SJD records certainty always).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.errors import UnknownNameError
from arimg.noise import Purpose


@dataclass(frozen=True)
class Blank:
    """Where drafts are wanted, and what is known there."""

    request: DecodeRequest
    codes_BN: Tensor            # by position; meaningful below known_B
    known_B: Tensor             # first position without a code or draft, >= 1
    positions_BW: Tensor        # wanted: those from known_B on; the others are ignored
    law_BV: Tensor              # law of the last position that a pass has judged

    @property
    def left_BW(self) -> Tensor:
        """The last known code."""
        return self.codes_BN.gather(1, self.known_B[:, None] - 1).expand_as(self.positions_BW)

    @property
    def up_BW(self) -> Tensor:
        """The code above, of the lowest row known there; the last known code in the top row."""
        width, known_B1 = self.request.grid[1], self.known_B[:, None]
        above_BW = known_B1 - width + (self.positions_BW - known_B1) % width
        return torch.where(above_BW >= 0, self.codes_BN.gather(1, above_BW.clamp_min(0)), self.left_BW)

    @property
    def law_BWV(self) -> Tensor:
        """The last judged law, at every position."""
        return self.law_BV[:, None].expand(-1, self.positions_BW.shape[1], -1)


class DraftInit(Protocol):
    """A way to make first drafts."""

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """codes_BW, and the laws (B, W, V) they were drawn from; None = certainty of these codes."""


class RandomCodes:
    """Uniformly random codes; `law` records that they are uniform."""

    def __init__(self, law: bool = False) -> None:
        self.law = law

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        uniform_BWV = torch.full_like(blank.law_BWV, 1 / blank.law_BV.shape[-1])
        codes_BW = blank.request.noise.categorical(uniform_BWV, blank.request.seeds_B, blank.positions_BW,
                                                   Purpose.DRAFT)
        return codes_BW, uniform_BWV if self.law else None


class LeftLaw:
    """Draws from the law of the last judged position, with each position's own noise; `law` records that law."""

    def __init__(self, law: bool = True) -> None:
        self.law = law

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        codes_BW = blank.request.noise.categorical(blank.law_BWV, blank.request.seeds_B, blank.positions_BW)
        return codes_BW, blank.law_BWV if self.law else None


class RepeatLeft:
    """The last known code, again and again."""

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        return blank.left_BW, None


class RepeatUp:
    """The code of the row above."""

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        return blank.up_BW, None


class NeighbourTable:
    """The code that last stood below the code of the row above (token recycling, Luo et al. 2024, arXiv:2408.08696, on
    a grid); the code of the row above itself as long as nothing was seen below it."""

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        up_BW, width = blank.up_BW, blank.request.grid[1]
        below_BM = blank.codes_BN[:, width:]
        position_M = torch.arange(width, blank.codes_BN.shape[1], device=up_BW.device)
        seen_BWM = (blank.codes_BN[:, None, :-width] == up_BW[..., None]) & (position_M < blank.known_B[:, None, None])
        last_BW = (seen_BWM * position_M).argmax(-1)
        return torch.where(seen_BWM.any(-1), below_BM.gather(1, last_BW), up_BW), None


INITS: dict[str, DraftInit] = {
    "random": RandomCodes(),
    "uniform-law": RandomCodes(law=True),
    "repeat-left": RepeatLeft(),
    "repeat-up": RepeatUp(),
    "sample-left": LeftLaw(law=False),
    "carry-law": LeftLaw(),
    "table": NeighbourTable(),
}


def find_init(init: str | DraftInit) -> DraftInit:
    """The draft initialisation of this name, or `init` itself. Raises UnknownNameError."""
    if not isinstance(init, str):
        return init
    if init not in INITS:
        raise UnknownNameError("draft initialisation", init, tuple(INITS))
    return INITS[init]
