"""Siblings at the first open position: when its draft fails, other codes get a chance, each with its next law read in
the same pass (the tree of SJD-PAC, Kang et al. 2026, arXiv:2603.18599, of depth one).

Siblings s_1 .. s_K are drawn without replacement from the draft's law q, so s_i has the law q without d, s_1 .. s_i-1;
each is tested against what the earlier tests have left of p (recursive rejection sampling, Jeon et al. 2024,
arXiv:2402.14160, theorem 3.2). Released SJD-PAC draws them from the residual and scores them as drawn from p: biased.

An accepted sibling s at position n also fixes position n+1, whose law given s was read beside the window. The cache
still holds the failed draft at n, so the row's next window begins at n+1, which reads s again, with the code of n+1
*pinned*: certain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arimg.accel.acceptance import Draws, RatioTest, Verdict, Window, at_codes, one_hot, residual
from arimg.accel.base import DecodeRequest
from arimg.accel.drafts import DraftInit
from arimg.accel.jacobi import Run, SpeculativeJacobi, at_row, with_forced
from arimg.accel.target import Target
from arimg.accel.windows import WindowPolicy
from arimg.errors import InputError
from arimg.noise import Purpose


@dataclass
class SiblingRun(Run):
    """The state of one decode with siblings."""

    pinned_B: Tensor = torch.empty(0)       # int64, 1 where the first position of the window is certain
    chosen_B: Tensor = torch.empty(0)       # bool, a sibling was accepted in this pass


class ScdSiblings(SpeculativeJacobi):
    """Maximal coupling with K siblings at the first open position."""

    def __init__(self, window: int | str | WindowPolicy = 32, init: str | DraftInit = "carry-law",
                 siblings: int = 2) -> None:
        super().__init__(RatioTest("max"), window, init)
        if siblings < 1:
            raise InputError(f"siblings is {siblings}; give at least 1, or use the decoder scd")
        self.leaves = siblings

    def begin(self, target: Target, request: DecodeRequest) -> SiblingRun:
        """As SpeculativeJacobi."""
        run = super().begin(target, request)
        none_B = torch.zeros_like(run.fixed_B)
        return SiblingRun(**vars(run), pinned_B=none_B, chosen_B=none_B.bool())

    def _read(self, run: Run, drafted_BW: Tensor, draws: Draws) -> Window:
        """The forward pass, siblings beside the window; p is certain at the first open position, which is decided."""
        assert isinstance(run, SiblingRun) and run.laws_BMV is not None
        positions_BW, width = draws.positions_BW, draws.positions_BW.shape[1]
        read_BW, root_B = positions_BW - 1, run.pinned_B.clamp_max(width - 1)
        codes_BW, laws_BWV = run.codes_BN.gather(1, positions_BW), run.laws_BMV[:, :width]
        root_B1 = root_B[:, None]
        draft_B1, position_B1 = codes_BW.gather(1, root_B1), positions_BW.gather(1, root_B1)
        q_BV = at_row(laws_BWV, root_B) * drafted_BW.gather(1, root_B1)
        siblings_BK, sibling_laws_BKV = self._siblings(q_BV, draft_B1, position_B1, draws)
        leaves_BK = position_B1.expand(-1, self.leaves)
        read_codes_BW = torch.cat([run.codes_BN.gather(1, read_BW), siblings_BK], dim=1)
        p_BWV = run.target.step(read_codes_BW, torch.cat([read_BW, leaves_BK], dim=1), min(run.fixed) - 1,
                                max(run.fixed) - 1 + width, self.leaves)
        p_BWV, next_BKV = p_BWV[:, :width], p_BWV[:, width:]
        p_BWV, next_BKV = (with_forced(p, at, run.request) for p, at in ((p_BWV, positions_BW),
                                                                         (next_BKV, leaves_BK + 1)))
        column_W = torch.arange(width, device=positions_BW.device)
        pinned_BW = column_W < run.pinned_B[:, None]
        p_BWV = torch.where(pinned_BW[..., None], one_hot(codes_BW, p_BWV), p_BWV)
        root = Root(at_row(p_BWV, root_B), q_BV, draft_B1, siblings_BK, sibling_laws_BKV, position_B1)
        decided_B1, chosen_B = root.decide(draws)
        run.chosen_B = chosen_B >= 0
        is_root_BW, is_next_BW = column_W == root_B1, column_W == root_B1 + 1
        p_BWV = torch.where(is_root_BW[..., None], one_hot(decided_B1, p_BWV), p_BWV)
        chosen_next_B1V = at_row(next_BKV, chosen_B.clamp_min(0))[:, None]
        p_BWV = torch.where((is_next_BW & run.chosen_B[:, None])[..., None], chosen_next_B1V, p_BWV)
        return Window(p_BWV, codes_BW, drafted_BW, laws_BWV)

    def _siblings(self, law_BV: Tensor, draft_B1: Tensor, position_B1: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """codes_BK drawn without replacement, none of them the draft, and their laws; a law of zeros = no sibling."""
        codes, laws = [draft_B1], []
        for k in range(self.leaves):
            law_BV = law_BV.scatter(1, codes[-1], 0.0)
            mass_B1 = law_BV.sum(-1, keepdim=True)
            laws.append(torch.where(mass_B1 > 0, law_BV / mass_B1, 0.0))
            certain_BV = one_hot(draft_B1, law_BV[:, None])[:, 0]
            drawn_B1V = torch.where(mass_B1 > 0, laws[-1], certain_BV)[:, None]
            codes.append(draws.request.noise.categorical(drawn_B1V, draws.request.seeds_B, position_B1, Purpose.DRAFT,
                                                         draws.turn * self.leaves + k))
        return torch.cat(codes[1:], dim=1), torch.stack(laws, dim=1)

    def _settle(self, run: Run, widths_B: Tensor, window: Window, draws: Draws, verdict: Verdict) -> None:
        """As SpeculativeJacobi; the code after an accepted sibling is pinned, or final if it is the last."""
        assert isinstance(run, SiblingRun)
        super()._settle(run, widths_B, window, draws, verdict)
        ends_B = run.chosen_B & (run.fixed_B == run.request.length - 1)
        run.fixed_B = run.fixed_B + ends_B.long()
        run.fixed_at_BL[:, -1] = torch.where(ends_B, run.target.forward_passes, run.fixed_at_BL[:, -1])
        run.pinned_B = (run.chosen_B & (run.fixed_B < run.request.length)).long()


@dataclass(frozen=True)
class Root:
    """The first open position: its law, its draft and the siblings."""

    p_BV: Tensor
    q_BV: Tensor                # zeros = no draft
    draft_B1: Tensor
    siblings_BK: Tensor
    laws_BKV: Tensor
    position_B1: Tensor

    def decide(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The final code (B, 1), and which sibling it is (B,), -1 = none."""
        rest_BV, open_B = self.p_BV, torch.ones_like(self.draft_B1[:, 0], dtype=torch.bool)
        decided_B, chosen_B = self.draft_B1[:, 0], torch.full_like(self.draft_B1[:, 0], -1)
        candidates = [(self.draft_B1, self.q_BV), *zip(self.siblings_BK.split(1, 1), self.laws_BKV.unbind(1))]
        for k, (code_B1, law_BV) in enumerate(candidates):
            chance_B = (at_codes(rest_BV, code_B1[:, 0]) / at_codes(law_BV, code_B1[:, 0])).nan_to_num(0.0, 0.0)
            passes_B1 = draws.request.noise.bernoulli(
                torch.where(open_B, chance_B, 0.0)[:, None], draws.request.seeds_B, self.position_B1, Purpose.ACCEPT,
                -(draws.turn * len(candidates) + k) - 1)
            accepted_B = open_B & passes_B1[:, 0]
            decided_B = torch.where(accepted_B, code_B1[:, 0], decided_B)
            chosen_B = torch.where(accepted_B, k - 1, chosen_B)
            open_B = open_B & ~accepted_B
            rest_BV = residual(rest_BV, law_BV)
        final_BV = torch.where(open_B[:, None], rest_BV, one_hot(decided_B[:, None], rest_BV[:, None])[:, 0])
        drawn_B1 = draws.request.noise.categorical(final_BV[:, None], draws.request.seeds_B, self.position_B1,
                                                   Purpose.RESIDUAL, -draws.turn - 1)
        return drawn_B1, chosen_B
