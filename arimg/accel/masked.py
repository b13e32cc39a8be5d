"""Plain decoding of continuous tokens, step by step: the oracle of every faster decoder of MAR and of causal models."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.contexts import Network, check_density, is_masked, open_plan
from arimg.accel.plan import Plan, Ramp
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Order


class PlainContinuous:
    """Each step predicts its tokens from all that came before. A token is a function of its context and of the noise
    of its seed and position, whatever else is in the batch.

    `ramp`: guidance grows linearly to its full scale (MAR) or is constant. `last_noise` adds the noise of the head's
    last step, which MAR leaves out: the law that continuous speculative decoding keeps.
    """

    guarantee: Guarantee = "same-law"
    order: Order = "continuous"
    masked: bool

    def __init__(self, ramp: Ramp = "linear", last_noise: bool = False) -> None:
        self.ramp = ramp
        self.last_noise = last_noise

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """latents_BLC. Given tokens stay as they are. Raises InputError on a network of the other kind."""
        if is_masked(target.backbone) != self.masked:
            raise InputError("the decoder masked is for networks that read any set of tokens, ar-continuous for causal "
                             "ones; use the other of the two")
        if self.last_noise:
            check_density(target.backbone.head, request)
        plan, canvas_BLC = open_plan(target.backbone, request)
        network = Network(target.backbone, request, plan, self.ramp, self.last_noise)
        counts = []
        for step in range(plan.steps):
            steps_B = torch.full_like(plan.steps_B, step)
            counts.append(paint_step(network, canvas_BLC, steps_B) / len(canvas_BLC))
            if on_step is not None:
                on_step(progress(network.passes, plan, steps_B + 1, canvas_BLC))
        stats = DecodeStats(network.passes, tuple(counts), extra={"head_tokens": network.head_tokens})
        return DecodeResult(stats, latents_BLC=canvas_BLC)


class Masked(PlainContinuous):
    """MAR: sets of tokens in a random order, in `steps` steps (64 unless the request says otherwise)."""

    masked = True


class ArContinuous(PlainContinuous):
    """A causal network: token by token in raster order."""

    masked = False


def paint_step(network: Network, canvas_BLC: Tensor, steps_B: Tensor) -> int:
    """Write the tokens of one step of each picture onto the canvas. Returns how many there were."""
    drawn = network.draw(canvas_BLC, steps_B[:, None])
    canvas_BLC[drawn.tokens.images_N, drawn.tokens.positions_N] = drawn.sample.latents_NC.to(canvas_BLC.dtype)
    return len(drawn.tokens.images_N)


def progress(passes: int, plan: Plan, steps_B: Tensor, canvas_BLC: Tensor) -> StepInfo:
    """What a decoder of continuous tokens reports when so many steps of each picture are done: there are no codes."""
    fixed = int(plan.bound(steps_B[:, None]).sum())
    return StepInfo(passes, fixed, plan.rank_BL.numel(), torch.zeros_like(plan.rank_BL))
