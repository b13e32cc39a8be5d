"""Speculative decoding of continuous tokens, exact (after Wang et al. 2024, arXiv:2411.11925; what their code does
instead is accel/relaxed.py), and fixed-point iteration with noise fixed per position.

Letters: B images; L tokens; W drafted steps; N tokens of a pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep
from arimg.accel.contexts import Drawn, Network, check_density, check_draft, open_plan
from arimg.accel.gaussians import Gaussian, accepted, recoupled
from arimg.accel.masked import paint_step, progress
from arimg.accel.plan import Ramp
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Order
from arimg.noise import Purpose

LONGEST_DRAFT = 8       # of window "auto"


class Cspd:
    """Draft and verify with rollback. The draft draws up to `window` steps; the target reads them all in one pass,
    each step given the drafts before it; from the left, a drafted token x is kept with probability min(1, p(x) / q(x)),
    p and q the Gaussians of the last head step, else replaced by a draw of the normalised positive part of p - q, and
    every step after it is dropped. If all are kept, the target's own next step comes free.

    The law is that of plain decoding with `last_noise`, for every draft network: both heads use the same noise up to
    the last step, whose noise is drawn (without it a token has no density). Each step has the guidance that it would
    have had. Several tokens of one step (MAR) are independent given their context and are judged on their own.

    `window` "auto" chooses for each picture the length with the most tokens per cost by its own acceptance so far.
    `prefill`: share of the steps, at the beginning, that the target paints alone.
    """

    guarantee: Guarantee = "same-law"
    order: Order = "continuous"
    second_network = "cspd"

    def __init__(self, draft: Any = None, window: int | str = 4, prefill: float = 0.0,
                 ramp: Ramp = "linear") -> None:
        if window != "auto" and (not isinstance(window, int) or window < 1):
            raise InputError(f"--window {window}: the decoder cspd takes the whole number of steps that are drafted, "
                             "at least 1, or auto")
        if not 0 <= prefill <= 1:
            raise InputError(f"prefill {prefill}: is a share of the steps; give a number in [0, 1]")
        self.draft, self.window, self.prefill, self.ramp = draft, window, prefill, ramp

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """latents_BLC. Raises InputError without a draft, and on networks and heads that do not fit."""
        run = SpeculativeRun(self, target.backbone, request)
        run.cursor_B = torch.ceil(run.plan.steps_B * self.prefill).long()
        for step in range(int(run.cursor_B.max())):
            paint_step(run.target, run.canvas_BLC, torch.where(step < run.cursor_B, step, run.plan.steps))
        while bool((run.cursor_B < run.plan.steps_B).any()):
            run.round()
            if on_step is not None:
                on_step(progress(run.target.passes, run.plan, run.cursor_B, run.canvas_BLC))
        return DecodeResult(DecodeStats(run.target.passes, tuple(run.fixed_per_round), extra=run.figures()),
                            latents_BLC=run.canvas_BLC)


class SpeculativeRun:
    """The run state of one decode. Pictures advance on their own; steps before `cursor_B` are final."""

    def __init__(self, decoder: Cspd, backbone: Any, request: DecodeRequest) -> None:
        if decoder.draft is None:
            raise InputError("the decoder cspd needs a draft network: Cspd(draft); jacobi-continuous needs none")
        check_draft(decoder.draft, backbone, request)
        self.decoder, self.request = decoder, request
        self.plan, self.canvas_BLC = open_plan(backbone, request)
        self.target = Network(backbone, request, self.plan, decoder.ramp, last_noise=True)
        self.draft = Network(decoder.draft, request, self.plan, decoder.ramp, last_noise=True)
        self.cursor_B = torch.zeros_like(self.plan.steps_B)
        self.judged_B, self.kept_B = torch.zeros_like(self.cursor_B), torch.zeros_like(self.cursor_B)
        self.tries, self.rejected, self.fixed_per_round = 0, 0, list[float]()
        self._cost = _parameters(decoder.draft) / _parameters(backbone)
        self._q_BLC = (torch.zeros_like(self.canvas_BLC), torch.ones_like(self.canvas_BLC))     # mean and std

    @property
    def fixed(self) -> int:
        """Tokens of steps before the cursors, over all pictures."""
        return int(self.plan.bound(self.cursor_B[:, None]).sum())

    def figures(self) -> dict[str, Any]:
        """What the decode cost, besides passes of the target."""
        judged, kept = int(self.judged_B.sum()), int(self.kept_B.sum())
        return {"draft_passes": self.draft.passes, "head_tokens": self.target.head_tokens,
                "draft_head_tokens": self.draft.head_tokens, "judged": judged,
                "acceptance": kept / judged if judged else math.nan, "rejected": self.rejected, "tries": self.tries}

    def round(self) -> None:
        """Draft, verify, and move the cursors."""
        lengths_B = torch.minimum(self._lengths(), self.plan.steps_B - self.cursor_B)     # drafted steps
        self._draft(lengths_B)
        width = int(lengths_B.max()) + 1
        offsets_BW = torch.arange(width, device=lengths_B.device).expand(len(lengths_B), -1)
        steps_BW = torch.where(offsets_BW <= lengths_B[:, None], self.cursor_B[:, None] + offsets_BW, self.plan.steps)
        drawn = self.target.draw(self.canvas_BLC, steps_BW)
        stop_B = self._judge(drawn, lengths_B)
        before = self.fixed
        self.cursor_B = torch.minimum(self.cursor_B + stop_B + 1, self.plan.steps_B)
        for network in (self.target, self.draft):       # the last token of these was replaced or is new
            network.contexts.forget(torch.clamp(self.cursor_B - 1, min=0))
        self.fixed_per_round.append((self.fixed - before) / len(lengths_B))

    def _draft(self, lengths_B: Tensor) -> None:
        """Write drafts of the next steps onto the canvas, and keep the Gaussians they were drawn from."""
        for offset in range(int(lengths_B.max())):
            active_B = offset < lengths_B
            drawn = self.draft.draw(self.canvas_BLC,
                                    torch.where(active_B, self.cursor_B + offset, self.plan.steps)[:, None])
            where = (drawn.tokens.images_N, drawn.tokens.positions_N)
            for canvas, values in zip((self.canvas_BLC, *self._q_BLC),
                                      (drawn.sample.latents_NC, drawn.sample.mean_NC, drawn.sample.std_NC)):
                canvas[where] = values.to(canvas.dtype)

    def _judge(self, drawn: Drawn, lengths_B: Tensor) -> Tensor:
        """Write what becomes final. stop_B: the first step with a rejected token, or the free one behind the drafts."""
        (images_N, offsets_N, positions_N), sample = drawn.tokens, drawn.sample
        noise, where = self.request.noise, (images_N, positions_N)
        seeds_N, draft_NC = self.request.seeds_B[images_N], self.canvas_BLC[where]
        p, q = Gaussian(sample.mean_NC, sample.std_NC), Gaussian(self._q_BLC[0][where], self._q_BLC[1][where])
        uniform_N = noise.uniform(seeds_N, positions_N[:, None], 1, Purpose.ACCEPT)[:, 0, 0]
        drafted_N = offsets_N < lengths_B[images_N]
        rejected_N = drafted_N & ~accepted(draft_NC, p, q, uniform_N)
        failed_N = torch.where(rejected_N, offsets_N, lengths_B[images_N])
        stop_B = lengths_B.scatter_reduce(0, images_N, failed_N, "amin")
        final_N = offsets_N <= stop_B[images_N]
        rejected_N, judged_N = rejected_N & final_N, drafted_N & final_N
        result_NC = torch.where(drafted_N[:, None], draft_NC, sample.latents_NC.to(draft_NC.dtype))
        drawn_again = recoupled(draft_NC[rejected_N], p.pick(rejected_N), q.pick(rejected_N), seeds_N[rejected_N],
                                positions_N[rejected_N], noise)
        result_NC[rejected_N] = drawn_again.x_NC.to(result_NC.dtype)
        self.canvas_BLC[images_N[final_N], positions_N[final_N]] = result_NC[final_N]
        self.judged_B.scatter_add_(0, images_N, judged_N.long())
        self.kept_B.scatter_add_(0, images_N, (judged_N & ~rejected_N).long())
        self.rejected += int(rejected_N.sum())
        self.tries += int(drawn_again.tries_N.sum())
        return stop_B

    def _lengths(self) -> Tensor:
        """(B,) steps to draft. "auto": the length g with the most expected steps (1 - a^(g+1)) / (1 - a) per cost
        1 + g c of a round, for a picture's acceptance a (after one success and one failure in advance) and the draft's
        relative cost c (Leviathan et al. 2023, theorem 3.8)."""
        if not isinstance(self.decoder.window, str):
            return torch.full_like(self.cursor_B, self.decoder.window)
        a_B1 = ((self.kept_B + 1) / (self.judged_B + 2))[:, None]
        g_W = torch.arange(1, LONGEST_DRAFT + 1, device=a_B1.device)
        return ((1 - a_B1 ** (g_W + 1)) / (1 - a_B1) / (1 + g_W * self._cost)).argmax(1) + 1


class JacobiContinuous:
    """With its noise fixed, a token is a function of the tokens before it. Iterate `window` steps in parallel: every
    pass computes all of them from the guesses so far; a step is final when all guesses before it in the window moved by
    at most `tolerance` in this pass (the first always is). Tolerance 0 gives plain decoding's tokens up to rounding; a
    latent's standard deviation is about 1.
    """

    guarantee: Guarantee = "tolerance"
    order: Order = "continuous"

    def __init__(self, window: int = 8, tolerance: float = 1e-3, ramp: Ramp = "linear",
                 last_noise: bool = False) -> None:
        if not isinstance(window, int) or window < 1:
            raise InputError(f"--window {window}: the decoder jacobi-continuous takes the whole number of steps that "
                             "are computed together, at least 1")
        if not 0 <= tolerance < math.inf:
            raise InputError(f"tolerance {tolerance}: needs a finite number >= 0, in units of the latents")
        self.window, self.tolerance, self.ramp, self.last_noise = window, tolerance, ramp, last_noise

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """latents_BLC. Raises InputError on options that the model does not have."""
        if self.last_noise:
            check_density(target.backbone.head, request)
        plan, canvas_BLC = open_plan(target.backbone, request)
        network = Network(target.backbone, request, plan, self.ramp, self.last_noise)
        cursor_B, counts = torch.zeros_like(plan.steps_B), []
        while bool((cursor_B < plan.steps_B).any()):
            final_B = self._pass(network, canvas_BLC, cursor_B, plan.steps_B)
            counts.append(float(final_B.double().mean()))
            cursor_B = cursor_B + final_B
            network.contexts.forget(torch.clamp(cursor_B - 1, min=0))       # the last of them may have moved
            if on_step is not None:
                on_step(progress(network.passes, plan, cursor_B, canvas_BLC))
        stats = DecodeStats(network.passes, tuple(counts), extra={"head_tokens": network.head_tokens})
        return DecodeResult(stats, latents_BLC=canvas_BLC)

    def _pass(self, network: Network, canvas_BLC: Tensor, cursor_B: Tensor, steps_B: Tensor) -> Tensor:
        """One iteration of each picture's window. (B,) steps that became final."""
        offsets_W = torch.arange(self.window, device=cursor_B.device)
        drawn = network.draw(canvas_BLC, torch.minimum(cursor_B[:, None] + offsets_W, steps_B.max()))
        images_N, offsets_N, positions_N = drawn.tokens
        new_NC = drawn.sample.latents_NC.to(canvas_BLC.dtype)
        moved_N = (new_NC - canvas_BLC[images_N, positions_N]).abs().amax(-1) > self.tolerance
        canvas_BLC[images_N, positions_N] = new_NC
        first_N = torch.where(moved_N, offsets_N, self.window - 1)
        first_B = torch.full_like(cursor_B, self.window - 1).scatter_reduce(0, images_N, first_N, "amin")
        return torch.minimum(first_B + 1, steps_B - cursor_B)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
