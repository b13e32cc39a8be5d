"""The teacher's own sample for a given noise, and how a one-step student makes it cheap.

Distilled Decoding's map from noise to tokens is deterministic: token j is where its own Gaussian noise flows under the
teacher's law given the tokens before it. So it can be computed one unit after the other (`FlowAR`, `FlowScales`), or be
guessed by a student and corrected (`Verify`, `VerifyScales`): a pass of the teacher gives the laws of many positions
for the guessed prefix, each position's flow is solved anew from its own noise, and the leading guesses that it confirms
stand, as in exact Jacobi decoding (accel/jacobi.py). Both return the same codes.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from arimg.accel.acceptance import Draws, ExactMatch, Verdict, Window, leading
from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.flow import FlowNoise, FlowSolver
from arimg.accel.jacobi import Jacobi, SpeculativeJacobi
from arimg.accel.scale import ScaleByScale, scale_ends, scale_inputs
from arimg.accel.target import Target
from arimg.accel.windows import BUCKETS, AdaptiveWindow, WindowPolicy, nominal_cost
from arimg.errors import InputError
from arimg.models.base import Order

AT_ONCE = 16                # positions whose flows are followed together
AHEAD = 1                   # blocks of them behind a failed draft whose drafts are revised
FIRST_WINDOWS = (32, 64)    # of the drafts of a student


class FlowAR:
    """Plain decoding with the flow's noise in place of Gumbel noise: the oracle of `Verify`, and the maker of DD1's
    pairs. The law is the teacher's up to the error of the solver."""

    guarantee: Guarantee = "tolerance"
    order: Order = "raster"
    plain: type[PlainAR] | type[ScaleByScale] = PlainAR

    def __init__(self, solver: FlowSolver = FlowSolver()) -> None:
        self.solver = solver

    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64). Raises InputError without a codebook."""
        return self.plain().decode(*with_flow(target, request, self.solver), on_step)


class FlowScales(FlowAR):
    """The same for models that paint scale by scale."""

    order: Order = "scales"
    plain = ScaleByScale


class FlowMatch(ExactMatch):
    """The same test where draws are dear: flows are followed in blocks of AT_ONCE positions, and no farther than AHEAD
    blocks behind the one in which a picture's first draft fails. Drafts behind them stay what they are."""

    def judge(self, window: Window, draws: Draws) -> Verdict:
        """See Acceptance."""
        codes_BW, ahead_B = window.drafts_BW.clone(), torch.full_like(window.drafts_BW[:, 0], AHEAD)
        held_BW = torch.zeros_like(window.drafted_BW)
        for first in range(0, codes_BW.shape[1], AT_ONCE):
            here, rows_R = slice(first, first + AT_ONCE), (ahead_B >= 0).nonzero().flatten()
            if not len(rows_R):
                break
            request = replace(draws.request, seeds_B=draws.request.seeds_B[rows_R])
            part = Draws(request, draws.positions_BW[rows_R, here], draws.turn)
            drawn_RW = part.shared(window.p_BWV[rows_R, here])
            held_BW[rows_R, here] = (drawn_RW == codes_BW[rows_R, here]) & window.drafted_BW[rows_R, here]
            codes_BW[rows_R, here] = drawn_RW
            ahead_B -= (~held_BW[:, :here.stop].all(1)).long()
        return Verdict(leading(held_BW), codes_BW)


class Verify:
    """A student's codes, corrected to those of FlowAR for the same seeds.

    `draft` is any decoder of the same noise, such as Dd1; without one the guesses are those of exact Jacobi decoding,
    or the request's. A student's first windows are wide: `window` "auto" narrows them if it guesses badly.
    """

    guarantee: Guarantee = "tolerance"
    order: Order = "raster"

    def __init__(self, draft: Decoder | None = None, window: int | str | WindowPolicy = "auto",
                 solver: FlowSolver = FlowSolver()) -> None:
        self.draft = draft
        self.solver = solver
        self.jacobi: SpeculativeJacobi = Jacobi(window)
        if draft is not None:
            window = AdaptiveWindow(nominal_cost, BUCKETS[-1], FIRST_WINDOWS) if window == "auto" else window
            self.jacobi = SpeculativeJacobi(FlowMatch(), window, "repeat-up")

    @property
    def window(self) -> WindowPolicy:
        """Positions that a pass judges."""
        return self.jacobi.window

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64). `stats.forward_passes` counts the student's passes and the teacher's; `extra` tells them
        apart and gives the share of the draft's codes that stood. Raises InputError without a codebook."""
        draft_BL, draft_passes = drafted(self.draft, target, request)
        verified = replace(request, draft_BL=draft_BL)
        result = self.jacobi.decode(*with_flow(target, verified, self.solver), on_step)
        return reported(result, draft_BL, draft_passes)


class VerifyScales:
    """The same for models that paint scale by scale: a pass judges all open scales at once, and the first scale that it
    corrects is final, because its tokens depend on coarser scales alone. Pictures of a batch advance together."""

    guarantee: Guarantee = "tolerance"
    order: Order = "scales"

    def __init__(self, draft: Decoder, solver: FlowSolver = FlowSolver()) -> None:
        self.draft = draft
        self.solver = solver

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64), all scales; see Verify. Raises InputError when the tokenizer has no scales, and with forced
        codes."""
        draft_BL, draft_passes = drafted(self.draft, target, request)
        target, request = with_flow(target, request, self.solver)
        if request.space is None or request.space.scales is None or request.forced_BL is not None:
            raise InputError("this decoder verifies scale by scale, without forced codes; for a tokenizer of one scale "
                             "use Verify")
        assert draft_BL is not None
        space, ends, codes_BL = request.space, scale_ends(request.space.scales), draft_BL.clone()
        positions_BL = torch.arange(ends[-1], device=codes_BL.device).expand_as(codes_BL)
        fixed, p_BWV = 0, target.start()                            # scales that are final
        while fixed < len(ends) - 1:
            open_L = slice(ends[fixed], ends[-1])
            cells_BNC = scale_inputs(space.codebook_VC[codes_BL], space)[:, max(0, ends[fixed] - ends[1]):]
            first_BPV = p_BWV if fixed == 0 else p_BWV[:, :0]
            if cells_BNC.shape[1]:
                p_BWV = torch.cat([first_BPV, target.read(cells_BNC, ends[max(fixed, 1)])], dim=1)
            drawn_BW = target.draw(p_BWV, positions_BL[:, open_L])
            wrong_L = (drawn_BW != codes_BL[:, open_L]).any(0).nonzero().flatten()
            codes_BL[:, open_L] = drawn_BW
            first_wrong = ends[-1] if len(wrong_L) == 0 else ends[fixed] + int(wrong_L[0])
            fixed = sum(end <= first_wrong for end in ends[:-1])
            if on_step is not None:
                on_step(StepInfo(target.forward_passes, ends[fixed] * len(codes_BL), codes_BL.numel(), codes_BL))
        return reported(DecodeResult(DecodeStats(target.forward_passes), codes_BL), draft_BL, draft_passes)


def drafted(draft: Decoder | None, target: Target, request: DecodeRequest) -> tuple[Tensor | None, int]:
    """Codes to verify and the passes that they took."""
    if draft is None:
        return request.draft_BL, 0
    result = draft.decode(copy(target), request)
    return result.codes_BL, result.stats.forward_passes


def reported(result: DecodeResult, draft_BL: Tensor | None, draft_passes: int) -> DecodeResult:
    """`result` with the draft's passes and success."""
    assert result.codes_BL is not None
    passes = result.stats.forward_passes
    extra = {**result.stats.extra, "teacher_passes": passes, "draft_passes": draft_passes}
    if draft_BL is not None:
        extra["draft_agreement"] = float((draft_BL == result.codes_BL).double().mean())
    return replace(result, stats=replace(result.stats, forward_passes=passes + draft_passes, extra=extra))


def with_flow(target: Target, request: DecodeRequest, solver: FlowSolver) -> tuple[Target, DecodeRequest]:
    """A run and a request whose codes are drawn by the flow. Raises InputError without a codebook."""
    if request.space is None:
        raise InputError("the flow leads from noise to code vectors, and this tokenizer has none; use the decoder ar")
    noise = FlowNoise(codebook_VC=request.space.codebook_VC, solver=solver, source=request.noise)
    drawn, run = replace(request, noise=noise), copy(target)
    run.request = drawn
    return run, drawn
