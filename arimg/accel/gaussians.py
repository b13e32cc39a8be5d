"""Exact couplings of diagonal Gaussians, in log space and float64: what speculative decoding of continuous tokens rests
on (Leviathan et al. 2023; De Bortoli et al. 2025, arXiv:2501.05370).

p is the target's law of a token, q the draft's; N tokens of C channels; T tries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from arimg.noise import CounterNoise, Purpose

MOST_TRIES = 1024       # per round of `residual`; the number of rounds has no limit


class Gaussian(NamedTuple):
    """Independent channels."""

    mean_NC: Tensor
    std_NC: Tensor

    def double(self) -> Gaussian:
        """In float64."""
        return Gaussian(self.mean_NC.double(), self.std_NC.double())

    def pick(self, index_N: Tensor) -> Gaussian:
        """Some of the tokens."""
        return Gaussian(self.mean_NC[index_N], self.std_NC[index_N])


def log_density(x_NC: Tensor, law: Gaussian) -> Tensor:
    """(...,) log N(x; mean, std), summed over the last axis, in float64."""
    z = (x_NC.double() - law.mean_NC.double()) / law.std_NC.double()
    return -(z.square() / 2 + law.std_NC.double().log() + math.log(2 * math.pi) / 2).sum(-1)


def log_ratio(x_NC: Tensor, p: Gaussian, q: Gaussian) -> Tensor:
    """log p(x) - log q(x), in float64."""
    return log_density(x_NC, p) - log_density(x_NC, q)


def accepted(x_NC: Tensor, p: Gaussian, q: Gaussian, uniform_N: Tensor) -> Tensor:
    """Bool (N,): keep a draft x drawn from q with probability min(1, p(x) / q(x))."""
    return uniform_N.double().log() <= log_ratio(x_NC, p, q)


def overlap(p: Gaussian, q: Gaussian) -> Tensor:
    """The chance that a draft is kept when both have the same standard deviations: 2 Phi(-d / 2), d the distance of the
    means in standard deviations."""
    distance_N = ((p.mean_NC.double() - q.mean_NC.double()) / p.std_NC.double()).square().sum(-1).sqrt()
    return torch.special.erfc(distance_N / 2 / math.sqrt(2))


def reflected(x_NC: Tensor, p: Gaussian, q: Gaussian) -> Tensor:
    """What replaces a rejected draft x of q when both have the same standard deviations: with e the standardised draft
    and u the direction from the mean of q to that of p, mean_p + std (e - 2 u <u, e>). Together with `accepted` this is
    the maximal coupling by reflection: p exactly, without any try."""
    (mean_p, std), mean_q = p.double(), q.mean_NC.double()
    shift_NC = (mean_p - mean_q) / std
    u_NC = shift_NC / shift_NC.norm(dim=-1, keepdim=True)
    e_NC = (x_NC.double() - mean_q) / std
    return mean_p + std * (e_NC - 2 * u_NC * (u_NC * e_NC).sum(-1, keepdim=True))


class Residual(NamedTuple):
    """Draws from the residual law, and how many proposals each one took."""

    x_NC: Tensor
    tries_N: Tensor


def residual(p: Gaussian, q: Gaussian, seeds_N: Tensor, positions_N: Tensor, noise: CounterNoise) -> Residual:
    """Draws from the normalised positive part of p - q: propose y from p, keep it with probability max(0, 1 - q(y) /
    p(y)), until one is kept. Noise is keyed by token and try, so that no token depends on the others; rounds of 1, 2, 4
    ... tries keep the rare token that needs thousands affordable."""
    p, q = p.double(), q.double()
    x_NC, tries_N = p.mean_NC.clone(), torch.zeros_like(positions_N)
    open_M, size, draw = torch.arange(len(positions_N), device=positions_N.device), 1, 0
    while len(open_M):
        seeds, positions, channels = seeds_N[open_M], positions_N[open_M, None], x_NC.shape[1]
        normal_MTC = noise.normal(seeds, positions, size * channels, Purpose.RESIDUAL, 2 * draw)[:, 0]
        uniform_MT = noise.uniform(seeds, positions, size, Purpose.RESIDUAL, 2 * draw + 1)[:, 0].double()
        here_p, here_q = p.pick(open_M[:, None]), q.pick(open_M[:, None])
        y_MTC = here_p.mean_NC + here_p.std_NC * normal_MTC.unflatten(-1, (size, channels))
        kept_MT = uniform_MT <= 1 - torch.exp(-log_ratio(y_MTC, here_p, here_q))
        found_M, first_M = kept_MT.any(1), kept_MT.byte().argmax(1)
        tries_N[open_M] += torch.where(found_M, first_M + 1, size)
        x_NC[open_M[found_M]] = y_MTC[found_M, first_M[found_M]]
        open_M, size, draw = open_M[~found_M], min(2 * size, MOST_TRIES), draw + 1
    return Residual(x_NC, tries_N)


def recoupled(x_NC: Tensor, p: Gaussian, q: Gaussian, seeds_N: Tensor, positions_N: Tensor,
              noise: CounterNoise) -> Residual:
    """What replaces rejected drafts x: a reflection where the standard deviations agree, else a residual draw."""
    same_N = (p.std_NC == q.std_NC).all(-1)
    replaced_NC = reflected(x_NC, p, q)
    tries_N = torch.zeros_like(positions_N)
    other_N = ~same_N
    drawn = residual(p.pick(other_N), q.pick(other_N), seeds_N[other_N], positions_N[other_N], noise)
    replaced_NC[other_N], tries_N[other_N] = drawn.x_NC, drawn.tries_N
    return Residual(replaced_NC, tries_N)
