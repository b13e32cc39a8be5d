"""Do these codes follow the model's law? One teacher-forced pass scores generated codes against plain decoding.

If every code x_t was drawn from p_t(. | x_<t), then log p_t(x_t) + H(p_t) is a martingale difference with the variance
of log p_t under p_t, whatever decoder produced it, so the scores below are nearly standard normal over a picture's
tokens. A decoder that flattens the law (relaxed acceptance) scores far below zero.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.accel.scale import scale_inputs
from arimg.accel.target import Target
from arimg.models.base import Backbone, order_of
from arimg.noise import Purpose

CHUNK = 64                  # positions per teacher-forced pass
LIMIT = 4.0                 # standard deviations; a lawful decoder goes beyond once in 16,000 audits
KS_LIMIT = 1e-4


@dataclass(frozen=True)
class AuditReport:
    """Scores over all free tokens of a batch."""

    tokens: int             # free tokens whose law is not certain
    likelihood: float       # sum of log p(x) + H(p), in standard deviations
    mode: float             # sum of [x is the most likely code] - max p, in standard deviations
    ks: float               # p-value of Kolmogorov and Smirnov's test that randomised ranks of x under p are uniform

    @property
    def lawful(self) -> bool:
        """Whether all scores are within their limits."""
        return abs(self.likelihood) <= LIMIT and abs(self.mode) <= LIMIT and self.ks >= KS_LIMIT

    def __str__(self) -> str:
        verdict = "consistent with plain decoding" if self.lawful else "NOT the law of plain decoding"
        return (f"audit of {self.tokens} tokens: likelihood {self.likelihood:+.2f} sd, most likely code "
                f"{self.mode:+.2f} sd, rank test p = {self.ks:.3g}: {verdict}")

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "lawful": self.lawful}


@torch.no_grad()
def audit(backbone: Backbone, request: DecodeRequest, codes_BL: Tensor) -> AuditReport:
    """Score codes_BL against the law that `request` asks of `backbone`; forced codes are left out."""
    sums, ranks = torch.zeros(5, dtype=torch.float64), []
    for positions_BW, p_BWV in teacher_forced(backbone, request, codes_BL):
        codes_BW = codes_BL.gather(1, positions_BW)
        free_BW = torch.ones_like(codes_BW, dtype=torch.bool)
        if request.forced_BL is not None:
            free_BW = request.forced_BL.gather(1, positions_BW) < 0
        p_BWV = p_BWV.double()
        best_BW, mode_BW = p_BWV.max(-1)
        log_p_BWV = p_BWV.log().clamp_min(-1e30)
        entropy_BW = -(p_BWV * log_p_BWV).sum(-1)
        variance_BW = (p_BWV * log_p_BWV.square()).sum(-1) - entropy_BW.square()
        open_BW = free_BW & (best_BW < 1)
        score_BW = log_p_BWV.gather(-1, codes_BW[..., None])[..., 0] + entropy_BW
        hit_BW = (codes_BW == mode_BW).double() - best_BW
        parts = (torch.ones_like(best_BW), score_BW, variance_BW, hit_BW, best_BW * (1 - best_BW))
        sums += torch.stack([part[open_BW].sum() for part in parts]).cpu()
        ranks.append(_ranks(p_BWV, codes_BW, positions_BW, request)[open_BW].cpu())
    count, score, variance, hits, hit_variance = sums.tolist()
    return AuditReport(int(count), _ratio(score, variance), _ratio(hits, hit_variance), ks_uniform(torch.cat(ranks)))


def teacher_forced(backbone: Backbone, request: DecodeRequest, codes_BL: Tensor) -> Any:
    """Yields (positions_BW, p_BWV) of all tokens in order: the law of each given the codes before it (in the order of
    scales: those of coarser scales)."""
    target = Target(backbone, request)
    batch, length = codes_BL.shape
    positions_BL = torch.arange(length, device=codes_BL.device).expand(batch, -1)
    p_BWV = target.start()
    known = p_BWV.shape[1]
    yield positions_BL[:, :known], p_BWV
    if order_of(backbone) == "scales":
        assert request.space is not None
        cells_BNC = scale_inputs(request.space.codebook_VC[codes_BL], request.space)
        if known < length:
            yield positions_BL[:, known:], target.read(cells_BNC, known)
        return
    for first in range(1, length, CHUNK):
        here = positions_BL[:, first:first + CHUNK]
        yield here, target.step(codes_BL.gather(1, here - 1), here - 1, reached=first - 1)


def _ranks(p_BWV: Tensor, codes_BW: Tensor, positions_BW: Tensor, request: DecodeRequest) -> Tensor:
    """(B, W) randomised probability integral transform over codes sorted from likely to unlikely: uniform under p."""
    own_BW1 = p_BWV.gather(-1, codes_BW[..., None])
    codes_V = torch.arange(p_BWV.shape[-1], device=p_BWV.device)
    ahead_BWV = (p_BWV > own_BW1) | (p_BWV == own_BW1) & (codes_V < codes_BW[..., None])
    uniform_BW = request.noise.uniform(request.seeds_B, positions_BW, 1, Purpose.AUDIT)[..., 0]
    return (p_BWV * ahead_BWV).sum(-1) + own_BW1[..., 0] * uniform_BW


def ks_uniform(values_N: Tensor) -> float:
    """Asymptotic p-value of the Kolmogorov-Smirnov test that the values are uniform on [0, 1] (Stephens 1970)."""
    count = len(values_N)
    if count == 0:
        return 1.0
    sorted_N = values_N.double().sort().values
    grid_N = torch.arange(count, dtype=torch.float64) / count
    distance = max(float((sorted_N - grid_N).max()), float((grid_N + 1 / count - sorted_N).max()))
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    terms = sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * terms)) if scaled > 0.2 else 1.0


def _ratio(total: float, variance: float) -> float:
    """total / sqrt(variance); 0 / 0 = 0, and infinite where codes of probability 0 were met."""
    if variance > 0:
        return total / math.sqrt(variance)
    return 0.0 if total == 0 else math.copysign(math.inf, total)
