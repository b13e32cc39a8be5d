"""How drafts are judged: which of them stay, what replaces the first that does not, and what the later ones become.

Letters: B images; W positions of a pass; V codes. For every position of the window, p is its law given the drafts
before it, d its draft, q the law that d was drawn from. A rule keeps the law of plain decoding if, whatever was decided
at earlier positions, d ~ q, q does not depend on d or on anything later, and all draws are fresh (Teng et al. 2024,
Speculative Jacobi Decoding, arXiv:2410.01699, section 4; each rule is enumerated in tests/exactness).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guarantee
from arimg.errors import InputError, UnknownNameError
from arimg.noise import Purpose

Coupling = Literal["fresh", "max", "gumbel"]
COUPLINGS = ("fresh", "max", "gumbel")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one pass. `shared` gives a position the same noise in every pass, the others new noise."""

    request: DecodeRequest
    positions_BW: Tensor
    turn: int               # number of the pass

    def shared(self, p_BWV: Tensor) -> Tensor:
        """codes_BW, with the noise that plain decoding uses at these positions."""
        return self.request.noise.categorical(p_BWV, self.request.seeds_B, self.positions_BW)

    def fresh(self, p_BWV: Tensor) -> Tensor:
        """codes_BW, with noise of this pass alone."""
        return self.request.noise.categorical(p_BWV, self.request.seeds_B, self.positions_BW, Purpose.RESIDUAL,
                                              self.turn)

    def passes(self, p_BW: Tensor) -> Tensor:
        """Bool (B, W), True with probability min(1, p)."""
        return self.request.noise.bernoulli(p_BW, self.request.seeds_B, self.positions_BW, Purpose.ACCEPT, self.turn)


class Window(NamedTuple):
    """What is judged in one pass."""

    p_BWV: Tensor
    drafts_BW: Tensor
    drafted_BW: Tensor              # bool; False where there is no draft: the last position of a row's window, at least
    law_BWV: Tensor | None          # q; None for rules that need none


class Verdict(NamedTuple):
    """The outcome: the first `kept_B` drafts stay, and `codes_BW[kept]` is final as well."""

    kept_B: Tensor                  # int64
    codes_BW: Tensor                # kept drafts, the code that follows them, then the drafts of the next pass


class Acceptance(Protocol):
    """A rule. `needs_law`: q must be given, and q := p of this pass for every code that the rule leaves."""

    needs_law: bool
    guarantee: Guarantee

    def judge(self, window: Window, draws: Draws) -> Verdict:
        """Judge one window."""


def leading(ok_BW: Tensor) -> Tensor:
    """(B,) number of leading True values."""
    return ok_BW.long().cumprod(dim=1).sum(dim=1)


def residual(p_BWV: Tensor, q_BWV: Tensor) -> Tensor:
    """norm(max(0, p - q)), the law of the replacement of a rejected draft; p where q covers it (never rejected there).

    Leviathan et al. 2023, arXiv:2211.17192, section 2.3. It is not filtered again: p has been.
    """
    left_BWV = (p_BWV - q_BWV).clamp_min(0)
    mass_BW1 = left_BWV.sum(-1, keepdim=True)
    return torch.where(mass_BW1 > 0, left_BWV / mass_BW1, p_BWV)


def at_codes(values_BWV: Tensor, codes_BW: Tensor) -> Tensor:
    """values_BW of the codes."""
    return values_BWV.gather(-1, codes_BW[..., None])[..., 0]


def one_hot(codes_BW: Tensor, like_BWV: Tensor) -> Tensor:
    """The laws that are certain of these codes. (torch's own one_hot looks at the values, so the host would wait.)"""
    return (codes_BW[..., None] == torch.arange(like_BWV.shape[-1], device=codes_BW.device)).to(like_BWV.dtype)


class ExactMatch:
    """Gumbel-exact Jacobi: a draft stays if it is the very code that plain decoding draws there (its noise is fixed).

    Kept codes equal plain decoding's by induction, whatever the drafts were (Wiggers and Hoogeboom 2020,
    arXiv:2002.09928: fixed-point iteration on the noise).
    """

    needs_law = False
    guarantee: Guarantee = "same-codes"

    def judge(self, window: Window, draws: Draws) -> Verdict:
        """See Acceptance."""
        codes_BW = draws.shared(window.p_BWV)
        return Verdict(leading((codes_BW == window.drafts_BW) & window.drafted_BW), codes_BW)


class RatioTest:
    """Speculative sampling against the draft's own law: keep d with probability min(1, p(d) / q(d)), replace the first
    that fails by a draw from the residual. What becomes of the later drafts is the coupling:

    * "fresh": new draws from p (SJD, arXiv:2410.01699);
    * "max": kept or replaced by the same test, a maximal coupling of the draft's old and new law (SCD,
      arXiv:2510.24211; "adaptive continuation" of SJD-PAC, arXiv:2603.18599);
    * "gumbel": new draws from p with each position's own fixed noise (SCD's Gumbel sharing).

    In all of them q := p afterwards. (Released SCD keeps the old q for kept drafts, which is biased.)
    """

    needs_law = True
    guarantee: Guarantee = "same-law"

    def __init__(self, coupling: Coupling) -> None:
        if coupling not in COUPLINGS:
            raise UnknownNameError("coupling", coupling, COUPLINGS)
        self.coupling = coupling

    def ratio(self, window: Window, q_BWV: Tensor, draws: Draws) -> Tensor:
        """(B, W) acceptance probabilities, to be cut at 1."""
        return at_codes(window.p_BWV, window.drafts_BW) / at_codes(q_BWV, window.drafts_BW)

    def judge(self, window: Window, draws: Draws) -> Verdict:
        """See Acceptance."""
        p_BWV, drafts_BW, drafted_BW, law_BWV = window
        assert law_BWV is not None
        q_BWV = law_BWV * drafted_BW[..., None]                     # no draft: nothing to accept, the residual is p
        accepted_BW = draws.passes(self.ratio(window, q_BWV, draws).nan_to_num(0.0)) & drafted_BW
        kept_B = leading(accepted_BW)
        column_W = torch.arange(drafts_BW.shape[1], device=drafts_BW.device)
        before_BW, here_BW = column_W < kept_B[:, None], column_W == kept_B[:, None]
        stays_BW = accepted_BW if self.coupling == "max" else before_BW
        replaced_BW = ~stays_BW if self.coupling == "max" else here_BW
        certain_BWV, rest_BWV = one_hot(drafts_BW, p_BWV), residual(p_BWV, q_BWV)
        new_BWV = torch.where(stays_BW[..., None], certain_BWV, torch.where(replaced_BW[..., None], rest_BWV, p_BWV))
        if self.coupling != "gumbel":
            return Verdict(kept_B, draws.fresh(new_BWV))
        later_BW = ~(before_BW | here_BW)
        decided_BW = draws.fresh(torch.where(later_BW[..., None], certain_BWV, new_BWV))
        return Verdict(kept_B, torch.where(later_BW, draws.shared(p_BWV), decided_BW))


class GroupedRatioTest(RatioTest):
    """Grouped speculative decoding (So et al. 2025, arXiv:2508.07747): the test compares the mass of a group of codes
    around d, p(G) / q(G). Not lossless: it flattens the law.

    G: at most `reach` ranks above and below d in the order of p, with |p - p(d)| below `spread` and codebook vectors
    within squared distance `radius` of d's.
    """

    guarantee: Guarantee = "none"

    def __init__(self, reach: int = 7, spread: float = 0.15, radius: float = 0.5) -> None:
        super().__init__("fresh")
        if reach < 0 or spread < 0 or radius < 0:
            raise InputError(f"grouped test: reach {reach}, spread {spread}, radius {radius}; none may be negative")
        self.reach, self.spread, self.radius = reach, spread, radius

    def ratio(self, window: Window, q_BWV: Tensor, draws: Draws) -> Tensor:
        """p(G) / q(G)."""
        space = draws.request.space
        if space is None:
            raise InputError("the grouped test compares codebook vectors, and this tokenizer has none; "
                             "use the decoder sjd")
        p_BWV, drafts_BW = window.p_BWV, window.drafts_BW
        rank_BWV = p_BWV.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        near_BWV = (rank_BWV - at_codes(rank_BWV, drafts_BW)[..., None]).abs() <= self.reach
        near_BWV &= (p_BWV - at_codes(p_BWV, drafts_BW)[..., None]).abs() < self.spread
        codebook_VC = space.codebook_VC.to(p_BWV.dtype)
        near_BWV &= torch.cdist(codebook_VC[drafts_BW], codebook_VC[None]).square() < self.radius
        near_BWV |= one_hot(drafts_BW, p_BWV).bool()
        return (p_BWV * near_BWV).sum(-1) / (q_BWV * near_BWV).sum(-1)
