"""The noise schedule of MAR's diffusion head (Nichol and Dhariwal 2021, arXiv:2102.09672) as float64 numbers.

diffusers' `betas_for_alpha_bar` gives the same cosine betas in float32, which is not enough: 1 / sqrt(alpha_bar) is
2e4 at the noisiest step. So the tables are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from arimg.errors import ConfigError

TRAINING_STEPS = 1000
_MAX_BETA = 0.999


def cosine_betas(count: int = TRAINING_STEPS) -> list[float]:
    """beta_i = min(1 - f((i+1)/T) / f(i/T), 0.999) with f(u) = cos^2((u + 0.008) / 1.008 * pi / 2)."""
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return [min(1 - f((i + 1) / count) / f(i / count), _MAX_BETA) for i in range(count)]


def linear_betas(count: int = TRAINING_STEPS) -> list[float]:
    """From 1e-4 to 0.02 in equal steps, both scaled by 1000 / T (Ho et al. 2020)."""
    first, last = 0.1 / count, 20 / count
    return [first + (last - first) * i / (count - 1) for i in range(count)]


BETAS = {"cosine": cosine_betas, "linear": linear_betas}


def kept_timesteps(respacing: str, count: int = TRAINING_STEPS) -> tuple[int, ...]:
    """The original timesteps that a respaced process visits, ascending.

    "100": 100 steps, ends included; "10,20,30": so many in each of three equal sections; "ddim25": a constant whole
    stride that gives 25 steps; "": all. Raises ConfigError on anything else, and on fewer than 2 steps: the variance of
    the last step is that of the one before it.
    """
    if respacing.startswith("ddim"):
        kept = _strided(respacing, count)
    else:
        kept = _sections(respacing, count)
    if len(kept) < 2:
        raise ConfigError(f"steps {respacing!r}: the diffusion head needs at least 2 steps; the published models take "
                          "100")
    return kept


def _strided(respacing: str, count: int) -> tuple[int, ...]:
    wanted = respacing.removeprefix("ddim")
    for stride in range(1, count):
        if wanted.isdigit() and -(-count // stride) == int(wanted):
            return tuple(range(0, count, stride))
    raise ConfigError(f"steps {respacing!r}: no whole stride makes so many steps of {count}; write a number alone, or "
                      "ddim25, ddim50, ddim100")


def _sections(respacing: str, count: int) -> tuple[int, ...]:
    sections = respacing.split(",") if respacing else [str(count)]
    if not all(section.strip().isdigit() for section in sections):
        raise ConfigError(f"steps {respacing!r}: write a number of steps such as 100, numbers per section such as "
                          "10,20,30, or ddim25")
    size, extra = divmod(count, len(sections))
    start, kept = 0, set()
    for index, section in enumerate(sections):
        here, wanted = size + (index < extra), int(section)
        if wanted > here:
            raise ConfigError(f"steps {respacing!r}: {wanted} steps in a section of {here}; write at most {here}")
        stride = (here - 1) / (wanted - 1) if wanted > 1 else 1.0
        offsets = accumulate([0.0] + [stride] * (wanted - 1)) if wanted else []    # as released: a sum
        kept |= {start + round(offset) for offset in offsets}
        start += here
    return tuple(sorted(kept))


class StepNumbers(NamedTuple):
    """All that a step of the reverse process needs, as Python floats: nothing is copied to the device."""

    timestep: int           # of the training process; what the network sees
    alpha_bar: float
    alpha_bar_before: float     # of the next cleaner state, 1 at the end
    x0_of_x: float          # x0 = x0_of_x * x - x0_of_eps * eps
    x0_of_eps: float
    mean_of_x0: float       # posterior mean = mean_of_x0 * x0 + mean_of_x * x
    mean_of_x: float
    log_beta: float
    log_posterior: float    # log variance of the posterior; that of index 0 is that of index 1


@dataclass(frozen=True)
class Schedule:
    """A respaced process; index 0 is the last denoising step."""

    timesteps: tuple[int, ...]
    betas: tuple[float, ...]
    steps: tuple[StepNumbers, ...]

    def table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(S, 9): the fields of StepNumbers, for training, where each row has its own timestep."""
        return _table(self, device, dtype)


@cache
def _table(schedule: Schedule, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(schedule.steps, dtype=torch.float64).to(device, dtype)


@cache
def build_schedule(respacing: str = "", name: str = "cosine") -> Schedule:
    """The named process respaced: betas are made anew from the kept cumulative alphas. Raises ConfigError."""
    kept = kept_timesteps(respacing)
    alpha_bars = list(accumulate((1 - beta for beta in BETAS[name]()), lambda product, alpha: product * alpha))
    bars = [alpha_bars[timestep] for timestep in kept]
    before = [1.0, *bars[:-1]]
    betas = [1 - bar / previous for bar, previous in zip(bars, before)]
    variances = [beta * (1 - previous) / (1 - bar) for beta, bar, previous in zip(betas, bars, before)]
    variances[0] = variances[1]
    steps = tuple(
        StepNumbers(timestep, bar, previous, math.sqrt(1 / bar), math.sqrt(1 / bar - 1),
                    beta * math.sqrt(previous) / (1 - bar), (1 - previous) * math.sqrt(1 - beta) / (1 - bar),
                    math.log(beta), math.log(variance))
        for timestep, bar, previous, beta, variance in zip(kept, bars, before, betas, variances))
    return Schedule(kept, tuple(betas), steps)
