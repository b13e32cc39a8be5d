"""In which order and in how many steps the tokens of a picture are generated, and how strongly each step is guided.

Letters: B images; L tokens; S steps; W steps looked at together; N tokens; G guidance branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.accel.target import branch_scales
from arimg.errors import InputError
from arimg.noise import Purpose

DEFAULT_STEPS = 64
Ramp = Literal["linear", "constant"]


def tokens_per_step(free: int, steps: int) -> list[int]:
    """How many of `free` tokens each step predicts: the cosine rule of MaskGIT (Chang et al. 2022) with at least one
    token per step, so min(steps, free) steps. After step k of K, floor(free * cos(pi/2 * (k+1)/K)) stay masked."""
    steps, masked, counts = min(steps, free), free, []
    for step in range(steps):
        left = math.floor(free * math.cos(math.pi / 2 * (step + 1) / steps)) if step < steps - 1 else 0
        left = max(1, min(masked - 1, left)) if step < steps - 1 else 0
        counts.append(masked - left)
        masked = left
    return counts


@dataclass(frozen=True)
class Plan:
    """Token p of image b is number rank_BL[b, p] of its picture; steps s = 0 .. S-1 predict the numbers from
    bounds_BS[b, s] up to bounds_BS[b, s+1] (S+1 columns; a picture with fewer steps ends in empty ones)."""

    rank_BL: Tensor
    bounds_BS: Tensor
    free_BL: Tensor             # bool, False on tokens given by the caller
    steps_B: Tensor             # int64, steps of each picture

    @property
    def steps(self) -> int:
        """S, of the longest picture."""
        return self.bounds_BS.shape[1] - 1

    def bound(self, steps_BW: Tensor) -> Tensor:
        """(B, W) tokens known before these steps; L behind the last."""
        return self.bounds_BS.gather(1, steps_BW.clamp(max=self.steps))

    def known(self, steps_BW: Tensor) -> Tensor:
        """Bool (B, W, L): tokens known before these steps."""
        return self.rank_BL[:, None] < self.bound(steps_BW)[..., None]

    def predicted(self, steps_BW: Tensor) -> Tensor:
        """Bool (B, W, L): free tokens that these steps predict."""
        return self.known(steps_BW + 1) & ~self.known(steps_BW) & self.free_BL[:, None]


def given_tokens(request: DecodeRequest, channels: int) -> Tensor:
    """canvas_BLC in float32 at least: the tokens that the caller gives, NaN where the model is free. Raises
    InputError."""
    shape = (len(request.seeds_B), request.length, channels)
    if request.forced_BL is not None or request.draft_BL is not None:
        raise InputError("codes are given, but the tokens of this model are continuous; give forced_latents, with NaN "
                         "where the model is free")
    if request.guidance.plausibility:
        raise InputError(f"plausibility {request.guidance.plausibility}: continuous tokens have no codes "
                         "to bar; leave it out")
    if request.sampling.top_k or request.sampling.top_p < 1:
        raise InputError(f"top-k {request.sampling.top_k}, top-p {request.sampling.top_p}: continuous tokens have no "
                         "ranks; leave both out, or lower the temperature")
    given_BLC = request.forced_BLC
    if given_BLC is None:
        return torch.full(shape, math.nan, device=request.seeds_B.device)
    if given_BLC.shape != shape:
        raise InputError(f"forced latents of shape {tuple(given_BLC.shape)}: this model's tokens have shape {shape}")
    return given_BLC


def masked_plan(request: DecodeRequest, free_BL: Tensor) -> Plan:
    """A random order of the free tokens, keyed by seed and position; given tokens come first and cost no step. Raises
    InputError on a number of steps below 1."""
    steps = DEFAULT_STEPS if request.steps is None else request.steps
    if steps < 1:
        raise InputError(f"--steps {steps}: needs a whole number >= 1; {DEFAULT_STEPS} is the default")
    positions_BL = torch.arange(request.length, device=free_BL.device).expand_as(free_BL)
    uniform_BL = request.noise.uniform(request.seeds_B, positions_BL, 1, Purpose.ORDER)[..., 0]
    order_BL = torch.where(free_BL, uniform_BL, -1.0).argsort(dim=1, stable=True)
    rank_BL = torch.empty_like(order_BL).scatter_(1, order_BL, positions_BL)
    plans = [tokens_per_step(free, steps) for free in free_BL.sum(1).tolist()]
    longest = max(map(len, plans))
    bounds = []
    for counts in plans:
        known = request.length - sum(counts)
        bounds.append([known + sum(counts[:step]) for step in range(longest + 1)])
    return Plan(rank_BL, torch.tensor(bounds, device=free_BL.device), free_BL,
                torch.tensor([len(counts) for counts in plans], device=free_BL.device))


def raster_plan(request: DecodeRequest, free_BL: Tensor) -> Plan:
    """One token per step, in raster order. Raises InputError on a number of steps."""
    if request.steps is not None:
        raise InputError(f"--steps {request.steps}: this model paints token by token, so it has no number of steps; "
                         "leave it out")
    rank_BL = torch.arange(request.length, device=free_BL.device).expand_as(free_BL)
    bounds_BS = torch.arange(request.length + 1, device=free_BL.device).expand(len(free_BL), -1)
    return Plan(rank_BL, bounds_BS, free_BL, bounds_BS[:, -1])


def branches_of(request: DecodeRequest, ramp: Ramp) -> dict[str, float]:
    """The branches that a decode computes, see `branch_scales`. On a ramp the full one is always needed: the first
    steps are all of it."""
    return branch_scales(request.guidance, request.inject_KBLD is not None, ramp == "linear")


def guidance_scales(request: DecodeRequest, plan: Plan, ramp: Ramp, images_N: Tensor, steps_N: Tensor,
                    positions_N: Tensor, dtype: torch.dtype) -> Tensor:
    """scales_GN of Head.sample for tokens of these images, steps and positions.

    linear: 1 + (cfg - 1) * (share of the picture known after the step), where the last step counts one token as still
    masked, as released; constant: cfg. Outside the guidance interval all scales are 1, which leaves the full branch.
    """
    share_N = torch.ones(len(steps_N), dtype=dtype, device=steps_N.device)
    if ramp == "linear":
        known_N = plan.bounds_BS[images_N, (steps_N + 1).clamp(max=plan.steps)]
        share_N = known_N.clamp(max=request.length - 1).to(dtype) / request.length
    first, stop = request.guidance.interval
    share_N = torch.where(positions_N >= first, share_N, 0.0)
    if stop is not None:
        share_N = torch.where(positions_N < stop, share_N, 0.0)
    return torch.stack([1 + (scale - 1) * share_N for scale in branches_of(request, ramp).values()])
