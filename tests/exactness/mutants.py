"""Decoders that are wrong on purpose, each by one plausible step (sjd.md section 5), and their exact twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.acceptance import Draws, ExactMatch, RatioTest, Verdict, Window, at_codes, leading, one_hot, residual
from arimg.accel.base import DecodeRequest
from arimg.accel.drafts import Blank, RandomCodes
from arimg.accel.jacobi import Run, Scd, Sjd, SpeculativeJacobi, at_row
from arimg.accel.siblings import ScdSiblings, SiblingRun
from arimg.accel.target import Target
from arimg.noise import Purpose


class StaleLaw(Scd):
    """Kept drafts keep the law of the pass that drew them (released SCD)."""

    def _settle(self, run: Run, widths_B: Tensor, window: Window, draws: Draws, verdict: Verdict) -> None:
        assert window.law_BWV is not None
        kept_BW1 = ((verdict.codes_BW == window.drafts_BW) & window.drafted_BW)[..., None]
        p_BWV = torch.where(kept_BW1, window.law_BWV, window.p_BWV)
        super()._settle(run, widths_B, window._replace(p_BWV=p_BWV), draws, verdict)


class MinCommit(SpeculativeJacobi):
    """Both images of a batch advance by what the slower one does; what the faster one had kept becomes a draft again,
    with the law it was first drawn from (`stale`) or with q := p, which is exact."""

    def __init__(self, window: int, stale: bool) -> None:
        super().__init__(RatioTest("fresh"), window, "uniform-law")
        self.stale = stale

    def _settle(self, run: Run, widths_B: Tensor, window: Window, draws: Draws, verdict: Verdict) -> None:
        assert window.law_BWV is not None
        kept_B = verdict.kept_B.unflatten(0, (-1, 2)).amin(1).repeat_interleave(2)
        early_BW1 = (torch.arange(window.drafts_BW.shape[1]) < verdict.kept_B[:, None])[..., None]
        p_BWV = torch.where(early_BW1, window.law_BWV, window.p_BWV) if self.stale else window.p_BWV
        super()._settle(run, widths_B, window._replace(p_BWV=p_BWV), draws, verdict._replace(kept_B=kept_B))


class ReplacedSiblings(ScdSiblings):
    """Siblings are drawn without replacement and scored as if with it."""

    def _siblings(self, law_BV: Tensor, draft_B1: Tensor, position_B: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        codes_BK, laws_BKV = super()._siblings(law_BV, draft_B1, position_B, draws)
        return codes_BK, torch.where(laws_BKV.sum(-1, keepdim=True) > 0, law_BV[:, None], laws_BKV)


@dataclass
class ResidualRun(SiblingRun):
    """Remembers the residuals of the last pass."""

    rests_BMV: Tensor = torch.empty(0)      # zeros where there was no draft


class ResidualSiblings(ScdSiblings):
    """Siblings come from the residual of the last pass and are scored as if from q (released SJD-PAC)."""

    rest_BV = torch.empty(0)

    def begin(self, target: Target, request: DecodeRequest) -> ResidualRun:
        run = super().begin(target, request)
        assert run.laws_BMV is not None
        return ResidualRun(**vars(run), rests_BMV=torch.zeros_like(run.laws_BMV))

    def _read(self, run: Run, drafted_BW: Tensor, draws: Draws) -> Window:
        assert isinstance(run, ResidualRun)
        self.rest_BV = at_row(run.rests_BMV, run.pinned_B)
        return super()._read(run, drafted_BW, draws)

    def _siblings(self, law_BV: Tensor, draft_B1: Tensor, position_B: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        rest_BV = self.rest_BV.scatter(1, draft_B1, 0.0) * (law_BV > 0)
        drawn_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, law_BV)
        codes_BK, _ = super()._siblings(drawn_BV, draft_B1, position_B, draws)
        left_BV = law_BV.scatter(1, draft_B1, 0.0)
        return codes_BK, (left_BV / left_BV.sum(-1, keepdim=True)).nan_to_num(0.0)[:, None]

    def _settle(self, run: Run, widths_B: Tensor, window: Window, draws: Draws, verdict: Verdict) -> None:
        assert isinstance(run, ResidualRun) and window.law_BWV is not None
        rest_BWV = (window.p_BWV - window.law_BWV).clamp_min(0) * window.drafted_BW[..., None]
        before_B = run.fixed_B
        super()._settle(run, widths_B, window, draws, verdict)
        rest_BMV = F.pad(rest_BWV.nan_to_num(0.0), (0, 0, 0, 2 * run.rests_BMV.shape[1] - rest_BWV.shape[1]))
        slot_BM = (run.fixed_B - before_B)[:, None] + torch.arange(run.rests_BMV.shape[1])
        run.rests_BMV = rest_BMV.gather(1, slot_BM[..., None].expand_as(run.rests_BMV))


class BlockTest(RatioTest):
    """Block verification (Sun et al. 2024, arXiv:2403.10444): drafts are accepted together. Exact if all later drafts
    are drawn anew; biased with `coupled` ones."""

    def __init__(self, coupled: bool) -> None:
        super().__init__("fresh")
        self.coupled = coupled

    def judge(self, window: Window, draws: Draws) -> Verdict:
        p_BWV, drafts_BW, drafted_BW, law_BWV = window
        assert law_BWV is not None
        inside_BW = drafted_BW & (draws.positions_BW < draws.request.length)
        q_BWV = torch.where(inside_BW[..., None], law_BWV, 0.0)
        ratio_BW = (at_codes(p_BWV, drafts_BW) / at_codes(q_BWV, drafts_BW)).nan_to_num(0.0) * inside_BW
        rows, width = drafts_BW.shape
        joint_BW, last_B = torch.ones(rows, width).double(), inside_BW.sum(1)
        for i in range(1, width):
            joint_BW[:, i] = (joint_BW[:, i - 1] * ratio_BW[:, i - 1]).clamp_max(1)
        rest_BWV = (joint_BW[..., None] * p_BWV - q_BWV).clamp_min(0)
        over_BW = rest_BWV.sum(-1)
        chance_BW = (over_BW / (over_BW + 1 - joint_BW)).nan_to_num(1.0)
        column_W = torch.arange(width)
        chance_BW = torch.where(column_W == last_B[:, None], joint_BW, chance_BW) * (column_W <= last_B[:, None])
        chance_BW[:, 0] = 1.0
        passed_BW = draws.passes(chance_BW)
        kept_B = (passed_BW * column_W).amax(1)
        here_BW, before_BW = column_W == kept_B[:, None], column_W < kept_B[:, None]
        first_BWV = torch.where((column_W == last_B[:, None])[..., None], p_BWV, rest_BWV / over_BW[..., None])
        later_BWV = p_BWV
        if self.coupled:
            again_BW = draws.request.noise.bernoulli(ratio_BW, draws.request.seeds_B, draws.positions_BW,
                                                     Purpose.ACCEPT, -draws.turn) & inside_BW
            later_BWV = torch.where(again_BW[..., None], one_hot(drafts_BW, p_BWV), residual(p_BWV, q_BWV))
        law_BWV = torch.where(here_BW[..., None], first_BWV, later_BWV)
        return Verdict(kept_B, draws.fresh(torch.where(before_BW[..., None], one_hot(drafts_BW, p_BWV), law_BWV)))


class ThresholdReuse(RatioTest):
    """A later draft stays when p / q exceeds `ratio` and p exceeds `confidence` (SJD++ in spirit)."""

    def __init__(self, ratio: float = 0.0, confidence: float = 0.0) -> None:
        super().__init__("fresh")
        self.least = ratio, confidence

    def judge(self, window: Window, draws: Draws) -> Verdict:
        verdict = super().judge(window, draws)
        assert window.law_BWV is not None
        p_BW, q_BW = at_codes(window.p_BWV, window.drafts_BW), at_codes(window.law_BWV, window.drafts_BW)
        later_BW = torch.arange(p_BW.shape[1]) > verdict.kept_B[:, None]
        reused_BW = later_BW & window.drafted_BW & (p_BW / q_BW > self.least[0]) & (p_BW > self.least[1])
        return verdict._replace(codes_BW=torch.where(reused_BW, window.drafts_BW, verdict.codes_BW))


@dataclass(frozen=True)
class Given:
    """A window policy that returns what it was given."""

    widest: int
    given: list[int]

    def widths(self, fixed: Any, passes: Any, length: int) -> list[int]:
        """See WindowPolicy."""
        return self.given


class Truncated(Scd):
    """The window ends before the first draft that looks weak: where its own probability q(d) is low (`by_value`), which
    is biased, or where the law's largest one is."""

    def __init__(self, window: int, by_value: bool) -> None:
        super().__init__(window)
        self.by_value = by_value

    def advance(self, run: Run) -> None:
        assert run.laws_BMV is not None
        positions_BM = run.fixed_B[:, None] + torch.arange(run.laws_BMV.shape[1])
        strength_BM = run.laws_BMV.amax(-1)
        if self.by_value:
            strength_BM = at_codes(run.laws_BMV, run.codes_BN.gather(1, positions_BM))
        blank_BM = positions_BM >= run.known_B[:, None]
        widths_B = 1 + leading(blank_BM | (strength_BM > 0.5)).clamp_max(self.window.widest - 1)
        policy, self.window = self.window, Given(self.window.widest, widths_B.tolist())
        try:
            super().advance(run)
        finally:
            self.window = policy


class MislabelledDraft:
    """Draws uniformly and records the last judged law."""

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        return RandomCodes().fill(blank)[0], blank.law_BWV


@dataclass(frozen=True)
class StuckDraws(Draws):
    """The same acceptance noise in every pass."""

    def passes(self, p_BW: Tensor) -> Tensor:
        return self.request.noise.bernoulli(p_BW, self.request.seeds_B, self.positions_BW, Purpose.ACCEPT, 0)


class StuckNoise(RatioTest):
    """Maximal coupling on StuckDraws."""

    def judge(self, window: Window, draws: Draws) -> Verdict:
        return super().judge(window, StuckDraws(draws.request, draws.positions_BW, draws.turn))


@dataclass(frozen=True)
class SharedDraws(Draws):
    """Residuals are drawn with the noise that has drawn the draft."""

    def fresh(self, p_BWV: Tensor) -> Tensor:
        return self.shared(p_BWV)


class SharedResidual(RatioTest):
    """Gumbel sharing on SharedDraws."""

    def __init__(self) -> None:
        super().__init__("gumbel")

    def judge(self, window: Window, draws: Draws) -> Verdict:
        return super().judge(window, SharedDraws(draws.request, draws.positions_BW, draws.turn))


class Multiplier(RatioTest):
    """Acceptance probabilities times a factor (COOL-SD in spirit)."""

    def ratio(self, window: Window, q_BWV: Tensor, draws: Draws) -> Tensor:
        return 1.3 * super().ratio(window, q_BWV, draws)


class ForgottenLaw(Sjd):
    """New drafts keep the law of those they replace."""

    def _settle(self, run: Run, widths_B: Tensor, window: Window, draws: Draws, verdict: Verdict) -> None:
        assert window.law_BWV is not None
        p_BWV = torch.where(window.drafted_BW[..., None], window.law_BWV, window.p_BWV)
        super()._settle(run, widths_B, window._replace(p_BWV=p_BWV), draws, verdict)


class GenerousMatch(ExactMatch):
    """Likely drafts stay although plain decoding draws another code."""

    def judge(self, window: Window, draws: Draws) -> Verdict:
        codes_BW = super().judge(window, draws).codes_BW
        likely_BW = (at_codes(window.p_BWV, window.drafts_BW) > 0.5) & window.drafted_BW
        codes_BW = torch.where(likely_BW, window.drafts_BW, codes_BW)
        return Verdict(leading((codes_BW == window.drafts_BW) & window.drafted_BW), codes_BW)
