"""Distilled Decoding 1 (Liu et al. 2024, arXiv:2412.17153): a whole picture in one pass of a student, or in a few.

A pass at timestep t takes the first t *units* (tokens of a raster, scales of a pyramid) as they stand and tells what
the noise of all later ones flows into. Every pass starts from the same noise.

Letters: B images; L tokens, of all scales; C latent channels; V codes; U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.scale import scale_ends, scale_laws
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Condition, Order, order_of
from arimg.noise import Purpose, largest
from arimg.tokenizers.base import TokenSpace


class Student(Protocol):
    """A network that maps noise to tokens (models/students.py). `config.timesteps` and `config.split` tell the passes
    that it was trained for."""

    config: Any

    def features(self, latents_BLC: Tensor, clean_B: Tensor, condition: Condition, grid: tuple[int, int],
                 inject_KBLD: Tensor | None = None) -> Tensor:
        """h_BLD, which the heads read."""

    def logits(self, h_BWD: Tensor, condition: Condition) -> Tensor:
        """logits_BWV."""

    def latents(self, h_BWD: Tensor, condition: Condition) -> Tensor:
        """latents_BWC."""


@dataclass(frozen=True)
class Schedule:
    """Which passes to make (section 3.3 and appendix of the paper). Raises InputError."""

    timesteps: tuple[int, ...] = (0,)           # clean units of each pass of the student
    split: int | None = None                    # units from here on stay latents, earlier ones become codes; None = all
    teacher: tuple[int, int] | None = None      # units [a, b) are drawn by the teacher, before the pass at timestep b

    def __post_init__(self) -> None:
        if not self.timesteps or self.timesteps[0] < 0 or any(t >= s for t, s in pairwise(self.timesteps)):
            raise InputError(f"timesteps {list(self.timesteps)}: give numbers of clean units that grow, such as 0, 5")
        if self.split is not None and self.split < 0:
            raise InputError(f"split {self.split}: needs a number of units >= 0")
        first, stop = self.teacher or (0, self.timesteps[0])
        if not 0 <= first <= stop or stop not in self.timesteps:
            raise InputError(f"teacher units {first}:{stop}: needs first <= stop, and a pass at timestep {stop}")
        if first > 0 and stop == self.timesteps[0] or self.timesteps[0] > 0 and self.teacher is None:
            raise InputError(f"timesteps {list(self.timesteps)}, teacher {self.teacher}: nothing paints the units that "
                             "the first pass takes as clean; begin with timestep 0 or teacher units from 0")


SCHEDULES = {       # released, with the teacher; its own law has cfg 2, and top-p 0.95 (VAR) or top-k 8000
    "var-teacher-5-6": Schedule((0, 5), 5, teacher=(4, 5)), "var-teacher-4-6": Schedule((0, 5), 8, teacher=(3, 5)),
    "var-teacher-1-6": Schedule((5,), 9, teacher=(0, 5)),
    "llamagen-teacher-61-81": Schedule((0, 80), 180, teacher=(60, 80)),
    "llamagen-teacher-41-81": Schedule((0, 80), 180, teacher=(40, 80)),
    "llamagen-teacher-1-81": Schedule((80,), 220, teacher=(0, 80)),
}


LOGIT_ROWS = 256        # tokens of all pictures whose logits are made at once


def unit_ends(request: DecodeRequest) -> tuple[int, ...]:
    """U+1 numbers: how many tokens the first u units hold."""
    if request.space is None or request.space.scales is None:
        return tuple(range(request.length + 1))
    return scale_ends(request.space.scales)


def student_pass(student: Student, tokens_BLC: Tensor, noise_BLC: Tensor, clean: int, split: int,
                 request: DecodeRequest, codebook_VC: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens_BLC, codes_BW) after one pass: the first `clean` tokens as they are; then, up to `split`, the vectors of
    the codes with the largest logits; then latents as they come, which no codebook holds. Each head reads its own."""
    split = max(clean, split)
    input_BLC = torch.cat([tokens_BLC[:, :clean], noise_BLC[:, clean:].to(tokens_BLC.dtype)], dim=1)
    clean_B = torch.full((len(input_BLC),), clean, device=input_BLC.device)
    h_BLD = student.features(input_BLC, clean_B, request.condition, request.grid, request.inject_KBLD)
    codes_BW = _likeliest(student, h_BLD[:, clean:split], request.condition)
    latents_BWC = student.latents(h_BLD[:, split:], request.condition)
    vectors_BWC = codebook_VC[codes_BW].to(latents_BWC.dtype)
    return torch.cat([input_BLC[:, :clean].to(latents_BWC.dtype), vectors_BWC, latents_BWC], dim=1), codes_BW


def trained_schedule(student: Student, steps: int | None) -> Schedule:
    """The first `steps` passes (None = one) that the student was trained for. Raises InputError."""
    timesteps: tuple[int, ...] = student.config.timesteps
    count = 1 if steps is None else steps
    if count > len(timesteps):
        known = ", ".join(map(str, timesteps))
        raise InputError(f"--steps {count}: this student was trained for {len(timesteps)} "
                         f"(timesteps {known} in its config.json); give at most that many")
    return Schedule(timesteps[:count], student.config.split)


def _likeliest(student: Student, h_BWD: Tensor, condition: Condition) -> Tensor:
    """codes_BW of the largest logits, which are made some tokens at a time and never kept."""
    width = max(1, LOGIT_ROWS // len(h_BWD))
    return torch.cat([largest(student.logits(h, condition)) for h in h_BWD.split(width, dim=1)], dim=1)


class Dd1:
    """Decodes with a student: the passes of a schedule, else the first `steps` of those that it was trained for (one if
    not said). Codes are those nearest to the latents it ends with."""

    guarantee: Guarantee = "none"
    orders: ClassVar[tuple[Order, ...]] = ("raster", "scales")
    second_network = "dd1"

    def __init__(self, student: Student, schedule: Schedule | None = None) -> None:
        self.student = student
        self.schedule = schedule
        self.order = order_of(student)

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL and latents_BLC. `target` is asked only where the schedule names teacher units.

        Raises InputError without a codebook, with forced codes, on timesteps that the picture does not have, and on
        more steps than the student knows.
        """
        space = checked_space(request)
        ends = unit_ends(request)
        schedule = self.schedule or trained_schedule(self.student, request.steps)
        check_timesteps(schedule, len(ends) - 1)
        noise_BLC = starting_noise(request)
        split = ends[-1] if schedule.split is None else ends[min(schedule.split, len(ends) - 1)]
        tokens_BLC, codes_BL, passes = noise_BLC, torch.zeros_like(noise_BLC[..., 0], dtype=torch.int64), 0
        for timestep in schedule.timesteps:
            if schedule.teacher is not None and schedule.teacher[1] == timestep:
                first, stop = schedule.teacher
                tokens_BLC = resampled(target, tokens_BLC, ends, first, stop)
                passes += target.forward_passes
                codes_BL[:, :ends[stop]] = space.nearest(tokens_BLC[:, :ends[stop]])
            clean = ends[timestep]
            tokens_BLC, codes_BW = student_pass(self.student, tokens_BLC, noise_BLC, clean, split, request,
                                                space.codebook_VC)
            passes += 1
            stop = clean + codes_BW.shape[1]
            codes_BL[:, clean:stop], codes_BL[:, stop:] = codes_BW, space.nearest(tokens_BLC[:, stop:])
            if on_step is not None:
                on_step(StepInfo(passes, codes_BL.numel(), codes_BL.numel(), codes_BL))
        fixed = (0.0,) * (passes - 1) + (float(codes_BL.shape[1]),)
        stats = DecodeStats(passes, fixed, extra={"student_passes": len(schedule.timesteps)})
        return DecodeResult(stats, codes_BL, tokens_BLC)


def check_timesteps(schedule: Schedule, units: int) -> None:
    """Raises InputError when a picture of so many units ends before the last pass begins."""
    last = schedule.timesteps[-1]
    if last >= units:
        raise InputError(f"timestep {last}: this picture has {units} units, so the last pass may begin at "
                         f"{units - 1}; choose a schedule for pictures of this size")


def resampled(target: Target, tokens_BLC: Tensor, ends: tuple[int, ...], first: int, stop: int) -> Tensor:
    """tokens_BLC with units first .. stop-1 drawn anew by the teacher, one pass each; it reads, and so they become, the
    code vectors nearest to those before. The prefix of a pyramid is read block-causally, as its scales were made one
    after the other (the released sampler lets early scales see later ones).
    """
    space = target.request.space
    assert space is not None
    codes_BL = space.nearest(tokens_BLC)
    vectors_BLC = space.codebook_VC[codes_BL]
    positions_BL = torch.arange(codes_BL.shape[1], device=codes_BL.device).expand_as(codes_BL)
    if space.scales is None:
        laws = raster_laws(target, codes_BL, first)
    else:
        laws = scale_laws(target, space, vectors_BLC, first)
    for unit, p_BWV in laws:
        here = slice(ends[unit], ends[unit + 1])
        codes_BL[:, here] = target.draw(p_BWV, positions_BL[:, here])
        vectors_BLC[:, here] = space.codebook_VC[codes_BL[:, here]]
        if unit + 1 == stop:
            break
    return torch.where(positions_BL[..., None] < ends[stop], vectors_BLC.to(tokens_BLC.dtype), tokens_BLC)


def raster_laws(target: Target, codes_BL: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (j, p_B1V), the laws of tokens j = first, first+1, ...; the codes before j must be in codes_BL by then."""
    positions_BL = torch.arange(codes_BL.shape[1], device=codes_BL.device).expand_as(codes_BL)
    p_BWV, read = target.start(), slice(0, first)
    for position in range(first, codes_BL.shape[1]):
        if position > 0:
            p_BWV = target.step(codes_BL[:, read], positions_BL[:, read], reached=read.start)
        yield position, p_BWV[:, -1:]
        read = slice(position, position + 1)


def starting_noise(request: DecodeRequest) -> Tensor:
    """noise_BLC, float32: what the tokens of each image's seed start from."""
    assert request.space is not None
    positions_BL = torch.arange(request.length, device=request.seeds_B.device).expand(len(request.seeds_B), -1)
    return request.noise.normal(request.seeds_B, positions_BL, request.space.codebook_VC.shape[-1], Purpose.FLOW)


def checked_space(request: DecodeRequest) -> TokenSpace:
    if request.space is None:
        raise InputError("this decoder turns noise into code vectors, and this tokenizer has no codebook; use another")
    if request.forced_BL is not None:
        raise InputError("forced codes: a student paints every token at once and takes none; use jacobi, or leave "
                         "them out")
    return request.space
