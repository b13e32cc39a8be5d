"""Decoding with a one-step student: schedules, and what each pass may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, DecodeResult, Guidance, Sampling, StepInfo
from arimg.accel.dd1 import SCHEDULES, Dd1, Schedule, starting_noise
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Condition
from arimg.tokenizers.vq import VQSpace
from tests.exactness.toy import attentive_model, faint_inject
from tests.models.toy import toy_captions, toy_classes
from tests.models.toy_students import LATENTS, toy_student

SPACE = VQSpace(torch.randn(32, LATENTS, generator=torch.Generator().manual_seed(0)))
STUDENT = toy_student()


def request(**changes: Any) -> DecodeRequest:
    settings: dict[str, Any] = {"guidance": Guidance(2.0), "space": SPACE, "inject_KBLD": faint_inject(2), **changes}
    return DecodeRequest(toy_classes(2), (4, 4), torch.arange(2), **settings)


def decode(schedule: Schedule = Schedule(), on_step: Any = None, **changes: Any) -> tuple[DecodeResult, Tensor, Tensor]:
    asked = request(**changes)
    result = Dd1(STUDENT, schedule).decode(Target(attentive_model(), asked), asked, on_step)
    assert result.codes_BL is not None and result.latents_BLC is not None
    return result, result.codes_BL, result.latents_BLC


def test_one_pass() -> None:
    steps: list[StepInfo] = []
    result, codes, latents = decode(on_step=steps.append)
    assert result.stats.forward_passes == 1 == len(steps) and steps[0].fixed_tokens == 32
    noise = starting_noise(request())
    logits, raw = STUDENT(noise, torch.zeros(2), toy_classes(2), (4, 4), faint_inject(2))
    assert torch.equal(codes, logits.argmax(-1))
    assert torch.equal(latents, SPACE.codebook_VC[codes].double())
    _, split_codes, split_latents = decode(Schedule(split=5))
    assert torch.equal(split_latents[:, :5], latents[:, :5]) and torch.equal(split_latents[:, 5:], raw[:, 5:])
    assert torch.equal(split_codes[:, 5:], SPACE.nearest(raw)[:, 5:].long())


@pytest.mark.parametrize("timestep", [1, 7, 15])
def test_a_second_pass_leaves_the_clean_tokens_alone(timestep: int) -> None:
    _, codes, latents = decode(Schedule((0,), 8))
    result, again, refined = decode(Schedule((0, timestep), 8))
    assert result.stats.forward_passes == 2
    assert torch.equal(codes[:, :timestep], again[:, :timestep])
    assert torch.equal(latents[:, :timestep], refined[:, :timestep])
    assert not torch.equal(latents[:, timestep:], refined[:, timestep:])


def test_a_picture_depends_on_its_own_seed_alone() -> None:
    _, codes, _ = decode(Schedule((0, 6)))
    asked = DecodeRequest(Condition(class_ids_B=torch.tensor([1])), (4, 4), torch.tensor([1]), faint_inject(2)[:, 1:],
                          Guidance(2.0), space=SPACE)
    alone = Dd1(STUDENT, Schedule((0, 6))).decode(Target(attentive_model(), asked), asked).codes_BL
    assert alone is not None and torch.equal(alone[0], codes[1])


@pytest.mark.parametrize("first", [0, 5])
def test_the_teachers_units_are_plain_decodings(first: int) -> None:
    schedule = Schedule((9,) if first == 0 else (0, 9), teacher=(first, 9))
    result, codes, _ = decode(schedule, sampling=Sampling(top_k=9))
    _, student_codes, _ = decode()
    forced = torch.full((2, 16), -1)
    forced[:, :first] = student_codes[:, :first]
    asked = request(sampling=Sampling(top_k=9), forced_BL=forced)
    plain = PlainAR().decode(Target(attentive_model(), asked), asked).codes_BL
    assert plain is not None and torch.equal(codes[:, :9], plain[:, :9])
    students, prefix = (1, 0) if first == 0 else (2, 1)     # the teacher reads class and prefix in two passes
    assert result.stats.forward_passes == students + (9 - first) + prefix


def test_a_text_conditional_student() -> None:
    captions = toy_captions(2)
    assert captions.caption_BPC is not None
    condition = Condition(caption_BPC=captions.caption_BPC.double(), caption_mask_BP=captions.caption_mask_BP)
    asked = DecodeRequest(condition, (4, 4), torch.arange(2), faint_inject(2), Guidance(2.0), space=SPACE)
    teacher, student = attentive_model(conditioning="text"), toy_student(conditioning="text")
    result = Dd1(student, Schedule((0, 9), 4, teacher=(5, 9))).decode(Target(teacher, asked), asked)
    assert result.codes_BL is not None and result.codes_BL.shape == (2, 16)


def test_released_schedules() -> None:
    assert {name: schedule.teacher for name, schedule in SCHEDULES.items()} == {
        "var-teacher-5-6": (4, 5), "var-teacher-4-6": (3, 5), "var-teacher-1-6": (0, 5),
        "llamagen-teacher-61-81": (60, 80), "llamagen-teacher-41-81": (40, 80), "llamagen-teacher-1-81": (0, 80)}


@pytest.mark.parametrize("options", [
    {"timesteps": ()}, {"timesteps": (-1,)}, {"timesteps": (0, 4, 4)}, {"timesteps": (3,)}, {"split": -1},
    {"timesteps": (0, 5), "teacher": (3, 4)}, {"timesteps": (5,), "teacher": (2, 5)}, {"teacher": (-1, 0)},
])
def test_impossible_schedules(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        Schedule(**options)
    assert "\n" not in str(caught.value)


def test_impossible_requests() -> None:
    with pytest.raises(InputError, match="timestep 16: this picture has 16 units"):
        decode(Schedule((0, 16)))
    with pytest.raises(InputError, match="no codebook"):
        decode(space=None)
    with pytest.raises(InputError, match="forced codes"):
        decode(forced_BL=torch.full((2, 16), -1))
