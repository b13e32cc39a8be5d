"""Speculative Jacobi decoding: every pass judges a window of drafts at once and keeps the leading ones that hold.

One loop for the whole family; its parts (acceptance.py, drafts.py, windows.py) decide what is kept, what is tried and
how much. A row's window starts at its first open position n: the pass reads the codes at n-1 .. n+W-2 and judges
n .. n+W-1. Rows advance each at its own pace, and a later write to a position replaces the earlier one, so nothing is
ever rolled back or copied.

Letters: B images; W positions of a pass; L tokens; N = L + the widest window; V codes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arimg.accel.acceptance import Acceptance, Draws, ExactMatch, GroupedRatioTest, RatioTest, Verdict, Window, one_hot
from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.drafts import Blank, DraftInit, find_init
from arimg.accel.target import Target
from arimg.accel.windows import Pass, WindowPolicy, find_window
from arimg.devices import to_device


@dataclass
class Run:
    """The state of one decode."""

    target: Target
    request: DecodeRequest
    fixed: list[int]                    # per row: positions below are final; on the host
    fixed_B: Tensor                     # the same on the device
    known_B: Tensor                     # positions below hold a code or a draft
    codes_BN: Tensor                    # by position
    law_BV: Tensor                      # of the last judged position
    laws_BMV: Tensor | None             # laws that the drafts from fixed_B on were drawn from; None when not needed
    fixed_at_BL: Tensor                 # number of the pass that fixed each token
    passes: list[Pass] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether all rows are final."""
        return min(self.fixed) >= self.request.length


class SpeculativeJacobi:
    """The loop. `guarantee` is that of the acceptance rule."""

    leaves = 0          # of a tree, read beside the window in every pass

    def __init__(self, acceptance: Acceptance, window: int | str | WindowPolicy, init: str | DraftInit) -> None:
        """Raises InputError and UnknownNameError on parts that do not exist."""
        self.acceptance = acceptance
        self.window = find_window(window, measured=acceptance.guarantee == "same-codes")
        self.init = find_init(init)

    @property
    def guarantee(self) -> Guarantee:
        """See accel.base.Decoder."""
        return self.acceptance.guarantee

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64). The host waits for the device once per pass."""
        run = self.begin(target, request)
        while True:
            if on_step is not None:
                on_step(StepInfo(target.forward_passes, sum(run.fixed), run.fixed_at_BL.numel(), _codes(run)))
            if run.done:
                return _result(run)
            self.advance(run)

    def begin(self, target: Target, request: DecodeRequest) -> Run:
        """Read the prefix and draw the first token, as plain decoding does."""
        p_B1V = target.start(self.leaves)
        batch, length, device = p_B1V.shape[0], request.length, p_B1V.device
        codes_BN = torch.zeros(batch, length + self.window.widest, dtype=torch.int64, device=device)
        first_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        codes_BN[:, :1] = target.draw(with_forced(p_B1V, first_B1, request), first_B1)
        ones_B = torch.ones(batch, dtype=torch.int64, device=device)
        laws = p_B1V.new_zeros(batch, self.window.widest, p_B1V.shape[-1]) if self.acceptance.needs_law else None
        fixed_at_BL = torch.zeros(batch, length, dtype=torch.int64, device=device)
        fixed_at_BL[:, 0] = 1
        return Run(target, request, [1] * batch, ones_B, ones_B, codes_BN, p_B1V[:, 0], laws, fixed_at_BL)

    def advance(self, run: Run) -> None:
        """One pass over all rows."""
        began = time.perf_counter()
        widths = self.window.widths(run.fixed, run.passes, run.request.length)
        width = max(widths)
        positions_BW = run.fixed_B[:, None] + torch.arange(width, device=run.fixed_B.device)
        if width > 1:
            self._draft(run, positions_BW)
        widths_B = to_device(widths, positions_BW.device)
        drafted_BW = torch.arange(1, width + 1, device=positions_BW.device) < widths_B[:, None]
        draws = Draws(run.request, positions_BW, run.target.forward_passes + 1)
        window = self._read(run, drafted_BW, draws)
        self._settle(run, widths_B, window, draws, self.acceptance.judge(window, draws))
        fixed = run.fixed_B.tolist()
        counts = [now - before for now, before in zip(fixed, run.fixed)]
        run.passes.append(Pass(widths, counts, time.perf_counter() - began))
        run.fixed = fixed

    def _read(self, run: Run, drafted_BW: Tensor, draws: Draws) -> Window:
        """The forward pass."""
        positions_BW = draws.positions_BW
        width, read_BW = positions_BW.shape[1], positions_BW - 1
        p_BWV = run.target.step(run.codes_BN.gather(1, read_BW), read_BW, min(run.fixed) - 1,
                                max(run.fixed) - 1 + width)
        laws_BWV = None if run.laws_BMV is None else run.laws_BMV[:, :width]
        return Window(with_forced(p_BWV, positions_BW, run.request), run.codes_BN.gather(1, positions_BW), drafted_BW,
                      laws_BWV)

    def _settle(self, run: Run, widths_B: Tensor, window: Window, draws: Draws, verdict: Verdict) -> None:
        """Write the verdict into the state and move every row to its next open position."""
        _write(run, draws.positions_BW, widths_B, window.p_BWV, verdict)

    def _draft(self, run: Run, positions_BW: Tensor) -> None:
        """Fill the window's positions that hold nothing yet."""
        new_BW = positions_BW >= run.known_B[:, None]
        codes_BW, laws_BWV = self.init.fill(Blank(run.request, run.codes_BN, run.known_B, positions_BW, run.law_BV))
        for given_BL in (run.request.draft_BL, run.request.forced_BL):
            if given_BL is not None:
                given_BW = _at(given_BL, positions_BW)
                codes_BW = torch.where(given_BW >= 0, given_BW, codes_BW)
                if laws_BWV is not None:
                    laws_BWV = torch.where((given_BW >= 0)[..., None], one_hot(codes_BW, laws_BWV), laws_BWV)
        run.codes_BN.scatter_(1, positions_BW, torch.where(new_BW, codes_BW, run.codes_BN.gather(1, positions_BW)))
        if run.laws_BMV is not None:
            kept_BWV = run.laws_BMV[:, :positions_BW.shape[1]]
            laws_BWV = one_hot(codes_BW, kept_BWV) if laws_BWV is None else laws_BWV
            kept_BWV.copy_(torch.where(new_BW[..., None], laws_BWV, kept_BWV))


def _write(run: Run, positions_BW: Tensor, widths_B: Tensor, p_BWV: Tensor, verdict: Verdict) -> None:
    """Codes, laws and counts of one pass, row by row."""
    length, width = run.request.length, positions_BW.shape[1]
    column_W = torch.arange(width, device=positions_BW.device)
    judged_BW = column_W < widths_B[:, None]
    codes_BW = torch.where(judged_BW, verdict.codes_BW, run.codes_BN.gather(1, positions_BW))
    run.codes_BN.scatter_(1, positions_BW, codes_BW)
    count_B = torch.minimum(verdict.kept_B + 1, length - run.fixed_B)
    final_BW = column_W < count_B[:, None]
    inside_BW = positions_BW.clamp_max(length - 1)
    run.fixed_at_BL.scatter_reduce_(1, inside_BW, final_BW * run.target.forward_passes, "amax")
    run.law_BV = at_row(p_BWV, widths_B - 1)
    run.known_B = torch.maximum(run.known_B, run.fixed_B + widths_B).clamp_max(run.codes_BN.shape[1])
    if run.laws_BMV is not None:
        run.laws_BMV[:, :width] = torch.where(judged_BW[..., None], p_BWV, run.laws_BMV[:, :width])
        shifted_BM = count_B[:, None] + torch.arange(run.laws_BMV.shape[1], device=count_B.device)
        inside_BM1 = shifted_BM.clamp_max(run.laws_BMV.shape[1] - 1)[..., None]
        run.laws_BMV = run.laws_BMV.gather(1, inside_BM1.expand_as(run.laws_BMV))
    run.fixed_B = run.fixed_B + count_B


def at_row(values_BWV: Tensor, rows_B: Tensor) -> Tensor:
    """values_BV of one position per image."""
    return values_BWV.gather(1, rows_B[:, None, None].expand(-1, 1, values_BWV.shape[-1]))[:, 0]


def _at(given_BL: Tensor, positions_BW: Tensor) -> Tensor:
    """Given codes at positions; -1 beyond the end."""
    given_BW = given_BL.gather(1, positions_BW.clamp_max(given_BL.shape[1] - 1))
    return torch.where(positions_BW < given_BL.shape[1], given_BW, -1)


def with_forced(p_BWV: Tensor, positions_BW: Tensor, request: DecodeRequest) -> Tensor:
    """The laws with certainty where a code is forced."""
    if request.forced_BL is None:
        return p_BWV
    forced_BW = _at(request.forced_BL, positions_BW)
    return torch.where((forced_BW >= 0)[..., None], one_hot(forced_BW.clamp_min(0), p_BWV), p_BWV)


def _codes(run: Run) -> Tensor:
    return run.codes_BN[:, :run.request.length]


def _result(run: Run) -> DecodeResult:
    accepted = [1.0] + [sum(one.counts) / len(one.counts) for one in run.passes]
    stats = DecodeStats(run.target.forward_passes, tuple(accepted), extra={
        "fixed_at": run.fixed_at_BL.tolist(), "widths": [max(one.widths) for one in run.passes]})
    return DecodeResult(stats, codes_BL=_codes(run).clone())


class Jacobi(SpeculativeJacobi):
    """Exact Jacobi decoding: the codes of plain decoding for the same seeds, in fewer passes."""

    def __init__(self, window: int | str | WindowPolicy = "auto", init: str | DraftInit = "repeat-up") -> None:
        super().__init__(ExactMatch(), window, init)


class Sjd(SpeculativeJacobi):
    """Speculative Jacobi Decoding (Teng et al. 2024, arXiv:2410.01699), right for batches."""

    def __init__(self, window: int | str | WindowPolicy = 16, init: str | DraftInit = "repeat-up") -> None:
        super().__init__(RatioTest("fresh"), window, init)


class Scd(SpeculativeJacobi):
    """Speculative coupled decoding (arXiv:2510.24211) with maximal coupling."""

    def __init__(self, window: int | str | WindowPolicy = 32, init: str | DraftInit = "carry-law") -> None:
        super().__init__(RatioTest("max"), window, init)


class ScdGumbel(SpeculativeJacobi):
    """Speculative coupled decoding with shared Gumbel noise and the ratio test."""

    def __init__(self, window: int | str | WindowPolicy = 32, init: str | DraftInit = "carry-law") -> None:
        super().__init__(RatioTest("gumbel"), window, init)


class Gsd(SpeculativeJacobi):
    """Grouped speculative decoding (arXiv:2508.07747): fewer passes, another law."""

    def __init__(self, window: int | str | WindowPolicy = 16, init: str | DraftInit = "repeat-up") -> None:
        super().__init__(GroupedRatioTest(), window, init)
