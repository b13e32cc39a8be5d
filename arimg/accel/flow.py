"""The probability flow between Gaussian noise and a codebook, in closed form: the map from noise to codes of Distilled
Decoding 1 (Liu et al. 2024, arXiv:2412.17153, section 3) and the conditional score of Distilled Decoding 2 (Liu et al.
2025, arXiv:2510.21003, section 3).

A token q is the code vector c_j with probability p_j. Noised, x_t = (1 - t) q + t eps: Gaussian at t = 1, a code vector
at t = 0. With y = x / t and sigma = (1 - t) / t the posterior of the code given x_t is

    w_j = softmax_j(log p_j + sigma y.c_j - sigma^2 |c_j|^2 / 2),

which equals softmax_j(log p_j - |x - (1-t) c_j|^2 / (2 t^2)) without its division by t^2. A filtered code has log p_j =
-inf; at least one code of each token must not. Equations (1) to (4) of docs/distilled.md are this module's.

Letters: N tokens (in the functions of a point: any leading axes); V codes; C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.errors import InputError
from arimg.models.layers import at_least_float32
from arimg.noise import CounterNoise, Purpose

DECIDED = 1 - 1e-6          # a token whose posterior is this sure of a code ends there
_ENTRIES = 2 ** 22          # of posterior weights at a time, so that memory stays bounded at any N


def posterior_logits(x_NC: Tensor, t_N1: Tensor | float, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The logits of w_NV above; t in (0, 1]."""
    sigma_N1 = (1 - t_N1) / t_N1
    return log_p_NV + sigma_N1 * (x_NC / t_N1 @ codebook_VC.T) - sigma_N1 ** 2 * (codebook_VC.square().sum(-1) / 2)


def posterior(x_NC: Tensor, t_N1: Tensor | float, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """w_NV, the probability of each code given x_t."""
    return posterior_logits(x_NC, t_N1, log_p_NV, codebook_VC).softmax(-1)


def posterior_mean(x_NC: Tensor, t_N1: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """m_NC = E[q | x_t] = sum_j w_j c_j, differentiable in x alone."""
    return _PosteriorMean.apply(x_NC, t_N1, log_p_NV, codebook_VC)


class _PosteriorMean(torch.autograd.Function):
    """dm/dx = (1 - t) / t^2 * Cov_w[c]. The weights, the only large tensor, are made some rows at a time in both
    directions and never kept."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, t_N1: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
        ctx.save_for_backward(x_NC, t_N1, log_p_NV, codebook_VC)
        return torch.cat([posterior(x, t, log_p, codebook_VC) @ codebook_VC
                          for x, t, log_p in _chunks(x_NC, t_N1, log_p_NV)]).view_as(x_NC)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None, None, None]:
        x_NC, t_N1, log_p_NV, codebook_VC = ctx.saved_tensors
        parts = []
        for x, t, log_p, grad in _chunks(x_NC, t_N1, log_p_NV, grad_NC):
            w_NV, along_NV = posterior(x, t, log_p, codebook_VC), grad @ codebook_VC.T
            centred_NV = along_NV - (w_NV * along_NV).sum(-1, keepdim=True)
            parts.append((1 - t) / t ** 2 * (w_NV * centred_NV @ codebook_VC))
        return torch.cat(parts).view_as(x_NC), None, None, None


def _chunks(x_NC: Tensor, t_N1: Tensor, log_p_NV: Tensor, *more_NC: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, a few at a time."""
    t_N1 = t_N1.expand(*x_NC.shape[:-1], 1)
    size = _rows(log_p_NV.shape[-1])
    return zip(*(one.flatten(0, -2).split(size) for one in (x_NC, t_N1, log_p_NV, *more_NC)))


def velocity(x_NC: Tensor, t_N1: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """dx/dt = (x - m) / t."""
    return (x_NC - posterior_mean(x_NC, t_N1, log_p_NV, codebook_VC)) / t_N1


def score(x_NC: Tensor, t_N1: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """grad_x log p_t(x) = -(x - (1 - t) m) / t^2 (DD2: the teacher's conditional score)."""
    return -(x_NC - (1 - t_N1) * posterior_mean(x_NC, t_N1, log_p_NV, codebook_VC)) / t_N1 ** 2


def score_of_velocity(velocity_NC: Tensor, x_NC: Tensor, t_N1: Tensor) -> Tensor:
    """The score of a flow with this velocity: s = -(x + (1 - t) v) / t."""
    return -(x_NC + (1 - t_N1) * velocity_NC) / t_N1


def log_density(x_NC: Tensor, t_N1: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """log p_t(x), shape N: the mixture of the Gaussians N((1 - t) c_j, t^2) with weights p_j."""
    mixture_N = posterior_logits(x_NC, t_N1, log_p_NV, codebook_VC).logsumexp(-1)
    constant_N = x_NC.shape[-1] * (t_N1[..., 0].log() + math.log(2 * math.pi) / 2)
    return mixture_N - (x_NC / t_N1).square().sum(-1) / 2 - constant_N


def _rows(vocab: int) -> int:
    return max(1, _ENTRIES // vocab)


@dataclass(frozen=True)
class _Laws:
    """The laws of N tokens over the K <= V codes that they can reach, and the vectors [c, |c|^2 / 2] of these, E = C+1
    numbers: with them the posterior's logits are one product."""

    log_p_NK: Tensor
    vectors_NEK: Tensor                     # (E, K) where all codes are reached: those of every token
    codes_NK: Tensor | None = None          # None: all codes

    @classmethod
    def of(cls, log_p_NV: Tensor, codebook_VC: Tensor) -> _Laws:
        """Where filters leave an eighth of the codes or fewer, each token keeps its own: with more of them, shared
        products are faster and smaller."""
        vectors_VE = torch.cat([codebook_VC, codebook_VC.square().sum(-1, keepdim=True) / 2], dim=1)
        reached = int((log_p_NV > -math.inf).sum(-1).max())
        if 8 * reached > log_p_NV.shape[1]:
            return cls(log_p_NV, vectors_VE.T.contiguous())
        log_p_NK, codes_NK = log_p_NV.topk(reached)
        return cls(log_p_NK, vectors_VE[codes_NK].mT.contiguous(), codes_NK)

    def posterior(self, x_NC: Tensor, t: float) -> Tensor:
        """w_NK at x_t, as `posterior`."""
        sigma = (1 - t) / t
        left_NE = F.pad(x_NC * (sigma / t), (0, 1), value=-sigma ** 2)
        if self.codes_NK is None:
            return torch.addmm(self.log_p_NK, left_NE, self.vectors_NEK).softmax(-1)
        return torch.baddbmm(self.log_p_NK[:, None], left_NE[:, None], self.vectors_NEK)[:, 0].softmax(-1)

    def mean(self, w_NK: Tensor) -> Tensor:
        """m_NC."""
        if self.codes_NK is None:
            return (self.vectors_NEK @ w_NK.T)[:-1].T       # in this order twice as fast on a CPU
        return (self.vectors_NEK @ w_NK[..., None])[:, :-1, 0]

    def nearest(self, x_NC: Tensor) -> Tensor:
        """int64 codes_N of the nearest code vectors among those reached."""
        left_N1E = F.pad(x_NC, (0, 1), value=-1.0)[:, None]
        near_NK = (left_N1E @ self.vectors_NEK)[:, 0].masked_fill(self.log_p_NK == -math.inf, -math.inf)
        return self.likeliest(near_NK, slice(None))

    def likeliest(self, weights_NK: Tensor, chosen: Any) -> Tensor:
        """int64 codes of the largest weights, of the chosen tokens."""
        columns_M = weights_NK[chosen].argmax(-1)
        return columns_M if self.codes_NK is None else self.codes_NK[chosen].gather(1, columns_M[:, None])[:, 0]

    def pick(self, chosen_N: Tensor) -> _Laws:
        """Those of the tokens where the bool is true."""
        if self.codes_NK is None:
            return _Laws(self.log_p_NK[chosen_N], self.vectors_NEK)
        return _Laws(self.log_p_NK[chosen_N], self.vectors_NEK[chosen_N], self.codes_NK[chosen_N])


@dataclass(frozen=True)
class FlowSolver:
    """How the flow is followed from t = 1 to 0, in equal steps. Raises InputError.

    Heun's rule (the trapezoid; its last step is Euler's, as t = 0 is singular) reproduces the law in 50 steps, where
    Euler's needs some hundreds (docs/distilled.md).
    """

    steps: int = 50
    method: str = "heun"        # heun | euler

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"flow solver with {self.steps} steps: needs at least 1")
        if self.method not in ("heun", "euler"):
            raise InputError(f"flow solver {self.method!r}: choose heun or euler")

    @property
    def times(self) -> list[float]:
        """1 = t_0 > ... > t_K = 0."""
        return [1 - k / self.steps for k in range(self.steps + 1)]

    def step(self, x_NC: Tensor, t: float, s: float, mean_NC: Tensor, laws: _Laws) -> Tensor:
        """x_s from x_t and its posterior mean. Euler: x_s = (s/t) x_t + (1 - s/t) m, so that x_0 = m."""
        if s == 0:
            return mean_NC
        v_NC = (x_NC - mean_NC) / t
        ahead_NC = x_NC + (s - t) * v_NC
        if self.method == "euler":
            return ahead_NC
        v_ahead_NC = (ahead_NC - laws.mean(laws.posterior(ahead_NC, s))) / s
        return x_NC + (s - t) / 2 * (v_NC + v_ahead_NC)

    def trajectory(self, noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor,
                   times: Sequence[float] | None = None) -> Iterator[Tensor]:
        """Yields x_NC at each of `times` (None = its own), the noise first."""
        x_NC, laws = noise_NC, _Laws.of(log_p_NV, codebook_VC)
        yield x_NC
        for t, s in pairwise(self.times if times is None else times):
            x_NC = self.step(x_NC, t, s, laws.mean(laws.posterior(x_NC, t)), laws)
            yield x_NC

    def codes(self, noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
        """int64 codes_N that the noise flows into. Gaussian noise gives codes of law p.

        Computed in log p's precision, at least float32. A token is done as soon as its posterior is certain (DECIDED),
        so its code does not depend on its neighbours.
        """
        log_p_NV = at_least_float32(log_p_NV)
        noise_NC, codebook_VC = noise_NC.to(log_p_NV.dtype), codebook_VC.to(log_p_NV.dtype)
        size = _rows(len(codebook_VC))
        return torch.cat([self._codes(noise, _Laws.of(log_p, codebook_VC))
                          for noise, log_p in zip(noise_NC.split(size), log_p_NV.split(size))])

    def _codes(self, x_MC: Tensor, laws: _Laws) -> Tensor:
        codes_N = torch.zeros(len(x_MC), dtype=torch.int64, device=x_MC.device)
        at_M, done_M = torch.arange(len(x_MC), device=x_MC.device), codes_N.bool()      # M <= N tokens are followed
        for t, s in pairwise(self.times):
            w_MK = laws.posterior(x_MC, t)
            mean_MC = laws.mean(w_MK)
            certain_M = ~done_M if s == 0 else (w_MK.amax(-1) >= DECIDED) & ~done_M
            if certain_M.any():
                codes_N[at_M[certain_M]] = (laws.nearest(mean_MC)[certain_M] if s == 0
                                            else laws.likeliest(w_MK, certain_M))
                done_M |= certain_M
            if 4 * int(done_M.sum()) >= len(done_M):        # leaving one out costs a copy of the others
                x_MC, mean_MC, at_M, laws = x_MC[~done_M], mean_MC[~done_M], at_M[~done_M], laws.pick(~done_M)
                done_M = done_M[~done_M]
            if not len(at_M):
                break
            x_MC = self.step(x_MC, t, s, mean_MC, laws)
        return codes_N


def nearest(x_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """int64 codes_N of the nearest code vectors."""
    return (x_NC @ codebook_VC.T - codebook_VC.square().sum(-1) / 2).argmax(-1)


@dataclass(frozen=True)
class FlowNoise(CounterNoise):
    """The random source whose draw of a code is what the position's own Gaussian noise flows into, as in DD1's pairs.

    Draws of other purposes than a code are those of `source`, which also gives the Gaussian noise.
    """

    codebook_VC: Tensor = field(kw_only=True)
    solver: FlowSolver = FlowSolver()
    source: CounterNoise = CounterNoise()

    def words(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        """See CounterNoise."""
        return self.source.words(seeds_B, positions_BW, count, purpose, draw)

    def latents(self, seeds_B: Tensor, positions_BW: Tensor) -> Tensor:
        """noise_BWC, float32: what the flow starts from, and what a student reads."""
        return self.source.normal(seeds_B, positions_BW, self.codebook_VC.shape[-1], Purpose.FLOW)

    def categorical(self, p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.SAMPLE,
                    draw: int = 0) -> Tensor:
        """codes_BW of law p_BWV; equal keys share their noise across laws."""
        if purpose != Purpose.SAMPLE:
            return super().categorical(p_BWV, seeds_B, positions_BW, purpose, draw)
        noise_NC = self.latents(seeds_B, positions_BW).flatten(0, 1)
        return self.solver.codes(noise_NC, p_BWV.log().flatten(0, 1), self.codebook_VC).view(positions_BW.shape)
