"""Continuous Speculative Decoding as released (Wang et al. 2024, arXiv:2411.11925; its code at d91f721): another law
than the target's. docs/continuous.md lists where it differs from the paper and from exact speculation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep
from arimg.accel.contexts import Drawn, MaskedContexts, Network, Tokens, check_draft, is_masked, open_plan
from arimg.accel.gaussians import Gaussian, log_ratio
from arimg.accel.masked import paint_step, progress
from arimg.accel.plan import Ramp
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import HeadSample, Order
from arimg.noise import Purpose

Factor = Literal["released", "printed"]


@dataclass(frozen=True)
class Verification:
    """One verification of the relaxed rule: all tokens drafted since the one before."""

    tokens: Tokens
    draft: HeadSample
    target: HeadSample
    ratio_N: Tensor
    result_NC: Tensor


def log_factor(target: HeadSample, draft: HeadSample, factor: Factor) -> Tensor:
    """log_factor_N over the steps before the last one: prod sigma_p / sigma_q as released, its inverse as printed."""
    log_N = (target.earlier_log_std_NC - draft.earlier_log_std_NC).double().sum(-1)
    return log_N if factor == "released" else -log_N


def relaxed_log_ratio(x_NC: Tensor, p: Gaussian, q: Gaussian, log_factor_N: Tensor, inner_temperature: float) -> Tensor:
    """log of the released acceptance value: squared distances are divided by c^2, normalisers are not."""
    def log_value(law: Gaussian) -> Tensor:
        z = (x_NC.double() - law.mean_NC.double()) / law.std_NC.double() / inner_temperature
        return -(z.square() / 2 + law.std_NC.double().log()).sum(-1)
    return log_factor_N + log_value(p) - log_value(q)


def relaxed_residual(y_NC: Tensor, p: Gaussian, q: Gaussian, log_factor_N: Tensor) -> Tensor:
    """The released chance max(0, f p(y) - q(y)) / (f p(y)) that a proposal y is kept; c = 1 here."""
    return (1 - torch.exp(-log_ratio(y_NC, p, q) - log_factor_N)).clamp_min(0)


def relaxed_result(x_NC: Tensor, kept_N: Tensor, p: Gaussian, q: Gaussian, log_factor_N: Tensor,
                   proposals: Iterable[tuple[Tensor, Tensor]], overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """(result_NC, settled_N): drafts x where kept; elsewhere the first proposal mean_p + std_p * normal that is kept,
    or zero where none is. `proposals` gives (normal_NC, uniform_N); see CspdRelaxed for `overwrite`."""
    result_NC, pairs = torch.where(kept_N[:, None], x_NC, 0.0), iter(proposals)
    settled_N = kept_N & kept_N.all() if overwrite else kept_N
    while not bool(settled_N.all()) and (pair := next(pairs, None)) is not None:
        y_NC = p.mean_NC + p.std_NC * pair[0].to(p.mean_NC.dtype)
        found_N = relaxed_residual(y_NC, p, q, log_factor_N) > pair[1]
        replaced_N = found_N & ~(kept_N if overwrite else settled_N)
        result_NC[replaced_N], settled_N = y_NC[replaced_N], settled_N | found_N
    return result_NC, settled_N | kept_N


class CspdRelaxed:
    """The first steps (`prefill` of them) are the target's; then the draft paints on, and every `window` steps the
    target judges all new tokens from the context before them. Nothing is rolled back.

    `inner_temperature` c: squared distances count 1 / c^2. `factor`: of the trajectories, as released or as printed.
    A token whose `tries` proposals all fail becomes zero, as released. One guidance scale per verification: that of the
    last drafted step. `overwrite`: as released, proposals go on until every token of the batch, those with a kept
    draft too, has kept one, and a later one replaces the one before, so that a token depends on its batch.
    """

    guarantee: Guarantee = "none"
    order: Order = "continuous"
    second_network = "cspd"

    def __init__(self, draft: Any = None, window: int = 8, prefill: float = 0.15,
                 inner_temperature: float = 42.0, factor: Factor = "released", tries: int = 100,
                 overwrite: bool = False, ramp: Ramp = "linear") -> None:
        if not isinstance(window, int) or window < 1:
            raise InputError(f"--window {window}: the decoder cspd-relaxed takes the whole number of steps between "
                             "verifications, at least 1")
        if not inner_temperature > 0 or not 0 <= prefill <= 1:
            raise InputError(f"inner_temperature {inner_temperature}, prefill {prefill}: need a number above 0 and a "
                             "share in [0, 1]; released are 42 and 0.15")
        self.draft, self.window, self.prefill, self.ramp = draft, window, prefill, ramp
        self.inner_temperature, self.factor, self.tries = inner_temperature, factor, tries
        self.overwrite = overwrite

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """latents_BLC. Raises InputError without a draft and on causal networks."""
        run = RelaxedRun(self, target, request)
        for step in range(run.plan.steps):
            run.advance(step)
            if on_step is not None:
                done_B = torch.full_like(run.plan.steps_B, step + 1)
                on_step(progress(run.target.passes, run.plan, done_B, run.canvas_BLC))
        judged = sum(len(one.ratio_N) for one in run.verifications)
        extra = {"draft_passes": run.draft.passes, "draft_head_tokens": run.draft.head_tokens,
                 "head_tokens": run.target.head_tokens, "judged": judged,
                 "acceptance": run.kept / judged if judged else math.nan, "zeros": run.zeros}
        return DecodeResult(DecodeStats(run.target.passes, extra=extra), latents_BLC=run.canvas_BLC)


class RelaxedRun:
    """The run state of one decode."""

    def __init__(self, decoder: CspdRelaxed, target: Target, request: DecodeRequest) -> None:
        if decoder.draft is None:
            raise InputError("the decoder cspd-relaxed needs a draft network: CspdRelaxed(draft)")
        if not is_masked(target.backbone) or not is_masked(decoder.draft):
            raise InputError("the decoder cspd-relaxed is for networks that read any set of tokens (MAR); use cspd")
        check_draft(decoder.draft, target.backbone, request)
        self.decoder, self.request = decoder, request
        self.plan, self.canvas_BLC = open_plan(target.backbone, request)
        self.target = Network(target.backbone, request, self.plan, decoder.ramp, last_noise=False)
        self.draft = Network(decoder.draft, request, self.plan, decoder.ramp, last_noise=False)
        self.verifications: list[Verification] = []
        self.kept = self.zeros = 0
        self._pending: list[tuple[int, Drawn]] = []

    def advance(self, step: int) -> None:
        """One step of the target or of the draft, and the verification that may follow it."""
        if step <= math.floor(self.plan.steps * self.decoder.prefill):
            paint_step(self.target, self.canvas_BLC, torch.full_like(self.plan.steps_B, step))
            return
        steps_B1 = torch.full((len(self.canvas_BLC), 1), step, device=self.canvas_BLC.device)
        drawn = self.draft.draw(self.canvas_BLC, steps_B1)
        self._write(drawn.tokens, drawn.sample.latents_NC)
        self._pending.append((step, drawn))
        if step % self.decoder.window == 0 or step == self.plan.steps - 1:
            self._verify(step)

    def _verify(self, step: int) -> None:
        """The target predicts everything drafted since the last verification from what was known then."""
        steps_B1 = torch.full((len(self.canvas_BLC), 1), self._pending[0][0], device=self.canvas_BLC.device)
        tokens, draft = _joined([drawn for _, drawn in self._pending], self.canvas_BLC.shape[1])
        contexts = self.target.contexts
        assert isinstance(contexts, MaskedContexts)
        z_GND = contexts.read_known(self.canvas_BLC, self.plan.known(steps_B1), tokens)
        sample = self.target.speak(z_GND, tokens, torch.full_like(tokens.images_N, step), self.canvas_BLC)
        self._judge(tokens, draft, sample)
        self._pending.clear()

    def _judge(self, tokens: Tokens, draft: HeadSample, target: HeadSample) -> None:
        """Keep, replace, or blank."""
        decoder, noise = self.decoder, self.request.noise
        seeds_N, positions_N1 = self.request.seeds_B[tokens.images_N], tokens.positions_N[:, None]
        p, q = Gaussian(target.mean_NC, target.std_NC), Gaussian(draft.mean_NC, draft.std_NC)
        log_f_N = log_factor(target, draft, decoder.factor)
        log_r_N = relaxed_log_ratio(draft.latents_NC, p, q, log_f_N, decoder.inner_temperature)
        uniform_N = noise.uniform(seeds_N, positions_N1, 1, Purpose.ACCEPT)[:, 0, 0]
        kept_N = log_r_N > uniform_N.double().log()

        def proposals() -> Iterator[tuple[Tensor, Tensor]]:
            for k in range(decoder.tries):
                normal_NC = noise.normal(seeds_N, positions_N1, p.mean_NC.shape[1], Purpose.RESIDUAL, 2 * k)[:, 0]
                yield normal_NC, noise.uniform(seeds_N, positions_N1, 1, Purpose.RESIDUAL, 2 * k + 1)[:, 0, 0]
        result_NC, settled_N = relaxed_result(draft.latents_NC, kept_N, p, q, log_f_N, proposals(), decoder.overwrite)
        self.kept += int(kept_N.sum())
        self.zeros += int((~settled_N).sum())
        self._write(tokens, result_NC)
        self.verifications.append(Verification(tokens, draft, target, log_r_N.exp(), result_NC))

    def _write(self, tokens: Tokens, latents_NC: Tensor) -> None:
        self.canvas_BLC[tokens.images_N, tokens.positions_N] = latents_NC.to(self.canvas_BLC.dtype)


def _joined(parts: list[Drawn], length: int) -> tuple[Tokens, HeadSample]:
    """Tokens of several steps as those of one, image after image in ascending position."""
    images_N = torch.cat([part.tokens.images_N for part in parts])
    positions_N = torch.cat([part.tokens.positions_N for part in parts])
    order_N = (images_N * length + positions_N).argsort()
    tokens = Tokens(images_N[order_N], torch.zeros_like(order_N), positions_N[order_N])
    columns = zip(*((one.latents_NC, one.mean_NC, one.std_NC, one.earlier_log_std_NC)
                    for one in (part.sample for part in parts)))
    return tokens, HeadSample(*(torch.cat(column)[order_N] for column in columns))
