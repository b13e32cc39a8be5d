"""What decoders of continuous tokens cost: passes, head evaluations, acceptance, seconds, side by side with the target
alone at the same number of target passes, and with what the released scheme costs by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep
from arimg.accel.contexts import is_masked
from arimg.accel.continuous import Cspd, JacobiContinuous
from arimg.accel.masked import ArContinuous, Masked
from arimg.accel.plan import DEFAULT_STEPS
from arimg.accel.relaxed import CspdRelaxed
from arimg.accel.target import Target
from arimg.bench.machine import describe, markdown_table, median, timed
from arimg.errors import InputError
from arimg.models.base import Order, order_of
from arimg.pipeline import Pipeline

PREFILL = 0.05          # of the relaxed decoder, as its paper recommends


@dataclass(frozen=True)
class ContinuousCost:
    """One decoder on one batch."""

    decoder: str
    guarantee: Guarantee
    steps: int                          # of the plan
    passes: int                         # of the target
    draft_passes: int
    head_evaluations: int               # of the networks of both heads: one per token and step, for all pictures
    acceptance: float                   # share of judged drafts that were kept; nan without drafts
    accepted_length: float              # steps that a pass of the target made final
    seconds: float                      # median over the repeats, of the whole batch
    formula: float                      # expected speed-up, see `expected`; nan where there is none


@dataclass(frozen=True)
class ContinuousReport:
    """What `arimg bench continuous` measures."""

    machine: str
    dtype: str
    pictures: int
    repeats: int
    cfg: float
    draft_cost: float                   # seconds of a draft step / seconds of a target step, both plain
    rows: tuple[ContinuousCost, ...]


def expected(steps: int, prefill: int, window: int, cost: float) -> float:
    """Speed-up of the released scheme: K / (P + (K - P) c + V), V = ceil((K - P) / window). Acceptance is not in it."""
    return steps / (prefill + (steps - prefill) * cost + math.ceil((steps - prefill) / window))


def textbook(acceptance: float, window: int, cost: float) -> float:
    """Speed-up of draft and verify with rollback (Leviathan et al. 2023, theorem 3.8)."""
    tokens = window + 1 if acceptance == 1 else (1 - acceptance ** (window + 1)) / (1 - acceptance)
    return tokens / (1 + window * cost)


class _Capture:
    """Takes the request that a pipeline makes, and decodes nothing."""

    guarantee: Guarantee = "none"
    order: Order = "continuous"
    request: DecodeRequest

    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """Latents of no meaning."""
        self.request = request
        shape = (len(request.seeds_B), request.length, target.backbone.head.channels)
        return DecodeResult(DecodeStats(0), latents_BLC=torch.zeros(shape, device=request.seeds_B.device))


@torch.no_grad()
def bench_continuous(pipe: Pipeline, draft: Any, windows: Sequence[int], steps: int | None, cfg: float | None, n: int,
                     repeats: int) -> ContinuousReport:
    """Decode one batch with all decoders that fit, `repeats` times, in turns. `draft`: a network, or None. Raises
    InputError on a model whose tokens are codes."""
    if order_of(pipe.transformer) != "continuous":
        raise InputError("bench continuous: this model paints codes; use arimg bench decode")
    masked = is_masked(pipe.transformer)
    if steps is not None and not masked:
        raise InputError(f"--steps {steps}: this model paints token by token, so it has no number of steps; leave it "
                         "out")
    scale = pipe.settings.cfg if cfg is None else cfg
    capture = _Capture()
    pipe(class_id=0, n=n, cfg=scale, decoder=capture, lossy=True, output_type="latent")
    request = capture.request
    plain: type[Masked] | type[ArContinuous] = Masked if masked else ArContinuous
    total = min(steps or DEFAULT_STEPS, request.length) if masked else request.length
    decoders: dict[str, tuple[Decoder, int]] = {f"plain, {total} steps": (plain(), total)}
    for window in windows:
        decoders[f"jacobi-continuous W={window}"] = (JacobiContinuous(window), total)
        if draft is not None:
            decoders[f"cspd W={window}"] = (Cspd(draft, window), total)
            if masked:
                decoders[f"cspd-relaxed W={window}"] = (CspdRelaxed(draft, window, PREFILL), total)
    measured = _laps(pipe, request, decoders, masked, repeats)
    alone = {min(total, stats.forward_passes) for name, (_, stats) in measured.items() if name.startswith("cspd")}
    extra: dict[str, tuple[Decoder, int]] = {f"plain, {count} steps": (Masked(), count) for count in alone - {total}}
    if masked:
        decoders, measured = {**decoders, **extra}, {**measured, **_laps(pipe, request, extra, masked, repeats)}
    first = measured[f"plain, {total} steps"][0]
    cost = math.nan
    if draft is not None:
        same = replace(request, steps=total if masked else None)
        own = median(timed(pipe.device, lambda: plain().decode(Target(draft, same), same))[0] for _ in range(repeats))
        cost = own / first
    heads = [0 if one is None else one.head.evaluations for one in (pipe.transformer, draft)]
    rows = [_row(name, decoders[name], measured[name], cost, heads, "none" if name in extra else None)
            for name in measured]
    return ContinuousReport(describe(pipe.device), str(pipe.dtype).removeprefix("torch."), n, repeats, scale, cost,
                            tuple(rows))


def _laps(pipe: Pipeline, request: DecodeRequest, decoders: dict[str, tuple[Decoder, int]], masked: bool,
          repeats: int) -> dict[str, tuple[float, DecodeStats]]:
    """(median seconds, statistics) of each decoder; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    stats: dict[str, DecodeStats] = {}
    for turn in range(repeats + 1):
        for name, (decoder, steps) in decoders.items():
            here = replace(request, steps=steps if masked else None)
            lap, result = timed(pipe.device, lambda: decoder.decode(Target(pipe.transformer, here), here))
            stats[name] = result.stats
            if turn:
                seconds[name].append(lap)
    return {name: (median(seconds[name]), stats[name]) for name in decoders}


def _row(name: str, decoder: tuple[Decoder, int], measured: tuple[float, DecodeStats], cost: float,
         heads: Sequence[int], guarantee: Guarantee | None) -> ContinuousCost:
    """`heads`: evaluations for a token by the target's head and by the draft's. `guarantee`: where it is not the
    decoder's own, because it has fewer steps than the others."""
    (one, steps), (seconds, stats) = decoder, measured
    acceptance, formula = stats.extra.get("acceptance", math.nan), math.nan
    if isinstance(one, CspdRelaxed):
        formula = expected(steps, math.floor(steps * one.prefill) + 1, one.window, cost)
    elif isinstance(one, Cspd) and isinstance(one.window, int):
        formula = textbook(acceptance, one.window, cost)
    drawn = (stats.extra["head_tokens"], stats.extra.get("draft_head_tokens", 0))
    return ContinuousCost(name, guarantee or one.guarantee, steps, stats.forward_passes,
                          stats.extra.get("draft_passes", 0), heads[0] * drawn[0] + heads[1] * drawn[1], acceptance,
                          steps / stats.forward_passes, seconds, formula)


_COLUMNS = ("decoder", "guarantee", "target passes", "draft passes", "head evaluations", "acceptance", "steps/pass",
            "s", "speed-up", "formula")


def to_markdown(report: ContinuousReport) -> str:
    """The report as a page."""
    base, cost = report.rows[0].seconds, ""
    if not math.isnan(report.draft_cost):
        cost = f" A draft step costs {report.draft_cost:.3f} of the target's."
    rows = [[f"`{row.decoder}`", row.guarantee, str(row.passes), str(row.draft_passes), str(row.head_evaluations),
             _blank(row.acceptance), f"{row.accepted_length:.2f}", f"{row.seconds:.3f}", f"{base / row.seconds:.2f}x",
             _blank(row.formula)] for row in report.rows]
    return "\n".join([
        "# Decoders of continuous tokens side by side", "",
        f"{report.pictures} pictures in one batch, cfg {report.cfg:g}, {report.repeats} repeats in turns; "
        f"{report.dtype}; {report.machine}.{cost}", "", markdown_table(_COLUMNS, rows), "",
        "`plain` with fewer steps: the target alone, with as many passes as a speculative decoder took; a causal model "
        "has one token per step and no such row. Formula: of the released scheme, or of draft and verify with the "
        "measured acceptance."])


def _blank(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
