"""Distilled Decoding 2 (Liu et al. 2025, arXiv:2510.21003): a picture in one pass of a generator.

Letters: B images; L tokens, of all scales; N = L minus those of the first unit; C latent channels; U units (tokens of a
raster, scales of a pyramid).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.dd1 import checked_space, resampled, starting_noise, unit_ends
from arimg.accel.scale import scale_inputs
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Condition, Order, order_of
from arimg.tokenizers.base import TokenSpace


class Generator(Protocol):
    """A backbone with a velocity head (models/generators.py)."""

    backbone: Any
    first: int

    def __call__(self, read_BNC: Tensor, noise_BLC: Tensor, condition: Condition, grid: tuple[int, int],
                 inject_KBLD: Tensor | None = None) -> Tensor:
        """tokens_BLC of one step."""

    def hidden(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None) -> Tensor:
        """f_RWD of a pass of the backbone."""

    def velocity(self, x_NC: Tensor, t_N1: Tensor, feature_ND: Tensor) -> Tensor:
        """v_NC."""


def shifted(latents_BLC: Tensor, space: TokenSpace) -> Tensor:
    """read_BNC: what the slots after the prefix read of a sequence. A raster: the token before. A pyramid, and noise in
    it is treated as tokens are: the cells of the map that all coarser scales add up to."""
    if space.scales is None:
        return latents_BLC[:, :-1]
    return scale_inputs(latents_BLC, space)


class Dd2:
    """Decodes with a generator: one pass; then the teacher draws the units from `teacher_from` on anew (section 4.2:
    the last scales; None: the last `steps` - 1 units). Codes are those nearest to the latents."""

    guarantee: Guarantee = "none"
    orders: ClassVar[tuple[Order, ...]] = ("raster", "scales")
    second_network = "dd2"

    def __init__(self, generator: Generator, teacher_from: int | None = None) -> None:
        if teacher_from is not None and teacher_from < 1:
            raise InputError(f"teacher_from {teacher_from}: the generator paints at least one unit; give 1 or more")
        self.generator = generator
        self.teacher_from = teacher_from
        self.order = order_of(generator)

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL and latents_BLC. Raises InputError without a codebook, with forced codes, and when the picture has
        no unit `teacher_from`."""
        space = checked_space(request)
        ends = unit_ends(request)
        noise_BLC = starting_noise(request)
        tokens_BLC = self.generator(shifted(noise_BLC, space), noise_BLC, request.condition, request.grid,
                                    request.inject_KBLD)
        codes_BL, passes = space.nearest(tokens_BLC), 1
        first = self._teacher_from(len(ends) - 1, request.steps)
        if first < len(ends) - 1:
            tokens_BLC = resampled(target, tokens_BLC, ends, first, len(ends) - 1)
            codes_BL = space.nearest(tokens_BLC)
            passes += target.forward_passes
        if on_step is not None:
            on_step(StepInfo(passes, codes_BL.numel(), codes_BL.numel(), codes_BL))
        fixed = (0.0,) * (passes - 1) + (float(codes_BL.shape[1]),)
        return DecodeResult(DecodeStats(passes, fixed), codes_BL, tokens_BLC)

    def _teacher_from(self, units: int, steps: int | None) -> int:
        """The first unit that the teacher draws, `units` if none. Raises InputError."""
        if self.teacher_from is not None:
            if self.teacher_from >= units:
                raise InputError(f"teacher_from {self.teacher_from}: this picture has {units} units; give {units - 1} "
                                 "or less")
            return self.teacher_from
        count = 1 if steps is None else steps
        if count > units:
            raise InputError(f"--steps {count}: this picture has {units} units, of which the generator paints at least "
                             f"one; give {units} or less")
        return units - count + 1


class ArDiffusion:
    """The sampler of the first stage: unit after unit, each token's flow in `steps` Euler steps of the head. Shows how
    well a network knows the teacher's scores before it becomes a one-step generator."""

    guarantee: Guarantee = "none"

    def __init__(self, network: Generator, steps: int = 10) -> None:
        self.network = network
        self.steps = steps
        self.order = order_of(network)

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL and latents_BLC; `target` is not asked. Raises InputError as Dd2."""
        space, passes = checked_space(request), len(unit_ends(request)) - 1
        tokens_BLC = ar_diffusion(self.network, starting_noise(request), request, self.steps)
        codes_BL = space.nearest(tokens_BLC)
        if on_step is not None:
            on_step(StepInfo(passes, codes_BL.numel(), codes_BL.numel(), codes_BL))
        return DecodeResult(DecodeStats(passes), codes_BL, tokens_BLC)


def ar_diffusion(network: Generator, noise_BLC: Tensor, request: DecodeRequest, steps: int) -> Tensor:
    """tokens_BLC, one pass of the backbone per unit."""
    space, ends = checked_space(request), unit_ends(request)
    backbone, (batch, length) = network.backbone, noise_BLC.shape[:2]
    prefix = backbone.prefix_length
    offset = prefix - ends[1]                   # token j is predicted at slot offset + j
    slots_BS = torch.arange(offset + length, device=noise_BLC.device).expand(batch, -1)
    cache = backbone.new_cache(batch, offset + length, request.grid, request.condition.caption_mask_BP)
    tokens_BLC = noise_BLC.clone()
    for first, stop in pairwise(ends):
        if first == 0:
            x_BWD, slots_BW = backbone.prefix(request.condition), slots_BS[:, :prefix]
        else:
            slots_BW = slots_BS[:, offset + first:offset + stop]
            read_BNC = shifted(tokens_BLC, space)[:, first - ends[1]:stop - ends[1]]
            x_BWD = backbone.embed(read_BNC, slots_BW)
        inject_KBWD = None
        if request.inject_KBLD is not None:
            inject_KBWD = request.inject_KBLD[:, :, first:stop]
            inject_KBWD = F.pad(inject_KBWD, (0, 0, slots_BW.shape[1] - (stop - first), 0))
        feature_BWD = network.hidden(x_BWD, slots_BW, cache, inject_KBWD)[:, first - stop:]
        tokens_BLC[:, first:stop] = euler(network, noise_BLC[:, first:stop], feature_BWD, steps)
    return tokens_BLC


def euler(network: Generator, noise_BWC: Tensor, feature_BWD: Tensor, steps: int) -> Tensor:
    """tokens_BWC at t = 0 of the network's flow, in equal steps from t = 1."""
    x_BWC = noise_BWC
    for step in range(steps):
        t_BW1 = torch.full_like(x_BWC[..., :1], 1 - step / steps)
        x_BWC = x_BWC - network.velocity(x_BWC, t_BW1, feature_BWD) / steps
    return x_BWC
