"""Distilled Decoding and verification of models that paint scale by scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep
from arimg.accel.dd1 import Dd1, Schedule
from arimg.accel.dd2 import ArDiffusion, Dd2, ar_diffusion, shifted
from arimg.accel.find import check_order
from arimg.accel.flow import FlowSolver
from arimg.accel.scale import ScaleByScale
from arimg.accel.target import Target
from arimg.accel.verify import FlowScales, Verify, VerifyScales
from arimg.errors import InputError
from arimg.models.generators import VARGenerator
from arimg.models.var_students import VARStudent
from tests.accel.toy_pyramid import CLASSES, SPACE, request, scale_of, toy_inject, toy_teacher
from tests.models.toy_students import moved, perturb, toy_latents
from tests.models.toy_var import CHANNELS, ENDS, LENGTH, SCALES, SIZES

TEACHER, SOLVER = toy_teacher(), FlowSolver(20)
STUDENT = perturb(VARStudent.from_teacher(TEACHER))
GENERATOR = perturb(VARGenerator.from_teacher(TEACHER, head_width=16, head_depth=2))


def decode(decoder: Decoder, asked: DecodeRequest) -> DecodeResult:
    return decoder.decode(Target(TEACHER, asked), asked)


def codes_of(decoder: Decoder, asked: DecodeRequest) -> Tensor:
    codes_BL = decode(decoder, asked).codes_BL
    assert codes_BL is not None
    return codes_BL


class Given:
    """A decoder that returns these codes."""

    guarantee: Guarantee = "none"

    def __init__(self, codes_BL: Tensor) -> None:
        self.codes_BL = codes_BL

    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """The codes, in one pass."""
        return DecodeResult(DecodeStats(1), self.codes_BL)


def test_a_students_codes_are_corrected_to_the_teachers_own() -> None:
    sample = codes_of(FlowScales(SOLVER), request())
    result = decode(VerifyScales(Dd1(STUDENT), SOLVER), request())
    assert result.codes_BL is not None and torch.equal(result.codes_BL, sample)
    assert result.stats.extra["teacher_passes"] <= 1 + len(SCALES) and result.stats.extra["draft_passes"] == 1
    assert not torch.equal(codes_of(ScaleByScale(), request()), sample)


@pytest.mark.parametrize("wrong", [None, 0, 2, 8])
def test_passes_by_the_first_wrong_guess(wrong: int | None) -> None:
    sample = codes_of(FlowScales(SOLVER), request())
    guess = sample.clone()
    if wrong is not None:
        guess[1, wrong] = (guess[1, wrong] + 1) % SIZES["vocab_size"]
    result = decode(VerifyScales(Given(guess), SOLVER), request())
    assert result.codes_BL is not None and torch.equal(result.codes_BL, sample)
    most = 2 if wrong is None else 2 + len(SCALES) - 1 - scale_of(wrong)
    assert 2 <= result.stats.extra["teacher_passes"] <= most


def test_few_steps() -> None:
    one, two = (decode(Dd1(STUDENT, Schedule(steps, 2)), request()) for steps in ((0,), (0, 2)))
    assert one.codes_BL is not None and two.codes_BL is not None
    assert one.latents_BLC is not None and two.latents_BLC is not None
    assert torch.equal(one.latents_BLC[:, :5], two.latents_BLC[:, :5])
    assert not torch.equal(one.latents_BLC[:, 5:], two.latents_BLC[:, 5:])
    assert torch.equal(two.latents_BLC[:, :5], SPACE.codebook_VC[two.codes_BL[:, :5]])
    with pytest.raises(InputError, match="timestep 3: this picture has 3 units"):
        decode(Dd1(STUDENT, Schedule((0, 3))), request())


@pytest.mark.parametrize("first", [0, 1])
def test_the_teachers_scales_are_plain_decodings(first: int) -> None:
    schedule = Schedule((2,) if first == 0 else (0, 2), teacher=(first, 2))
    result = decode(Dd1(STUDENT, schedule), request())
    forced = torch.full((2, LENGTH), -1)
    forced[:, :ENDS[first]] = codes_of(Dd1(STUDENT), request())[:, :ENDS[first]]
    plain = codes_of(ScaleByScale(), request(forced_BL=forced))
    assert result.codes_BL is not None and torch.equal(result.codes_BL[:, :5], plain[:, :5])
    assert result.stats.forward_passes == (1 + 2 if first == 0 else 2 + 2)


def test_a_generator_paints_in_one_pass_and_the_teacher_the_last_scales() -> None:
    plain = decode(Dd2(GENERATOR), request())
    result = decode(Dd2(GENERATOR, teacher_from=2), request())
    assert plain.codes_BL is not None and result.codes_BL is not None and plain.stats.forward_passes == 1
    assert torch.equal(plain.codes_BL[:, :5], result.codes_BL[:, :5]) and result.stats.forward_passes == 1 + 2
    forced = torch.full((2, LENGTH), -1)
    forced[:, :5] = plain.codes_BL[:, :5]
    assert torch.equal(result.codes_BL, codes_of(ScaleByScale(), request(forced_BL=forced)))


@pytest.mark.parametrize("j", [0, 3, 9])
@torch.no_grad()
def test_noise_and_control_move_nothing_before_them(j: int) -> None:
    noise, inject = toy_latents(2, LENGTH, channels=CHANNELS), toy_inject()

    def tokens(noise: Tensor, inject: Tensor) -> Tensor:
        result: Tensor = GENERATOR(shifted(noise, SPACE), noise, CLASSES, SCALES[-1], inject)
        return result
    before = tokens(noise, inject)
    other_noise, other_inject = noise.clone(), inject.clone()
    other_noise[:, j] += 0.5
    other_inject[:, :, j] += 0.5
    later = list(range(ENDS[scale_of(j) + 1], LENGTH))
    assert moved(before, tokens(other_noise, inject)) == [j, *later]
    same_scale = list(range(ENDS[scale_of(j)], ENDS[scale_of(j) + 1]))      # control of a scale is seen by all of it
    assert moved(before, tokens(noise, other_inject)) == [*same_scale, *later]
    logits = [TEACHER(shifted(one, SPACE), CLASSES, inject) for one in (noise, other_noise)]
    assert moved(*logits) == later, "what the teacher reads of a scale it reads on finer ones alone"


@torch.no_grad()
def test_ar_diffusion_of_one_step_is_the_one_step_sample_of_its_own_prefix() -> None:
    noise, asked = toy_latents(2, LENGTH, channels=CHANNELS), request()
    sample = ar_diffusion(GENERATOR, noise, asked, steps=1)
    features = GENERATOR.features(shifted(sample, SPACE), CLASSES, SCALES[-1], asked.inject_KBLD)
    torch.testing.assert_close(noise - GENERATOR.velocity(noise, torch.ones_like(noise[..., :1]), features), sample)
    assert decode(ArDiffusion(GENERATOR, 2), asked).stats.forward_passes == len(SCALES)


def test_orders_must_fit() -> None:
    for decoder in (Dd1(STUDENT), Dd2(GENERATOR), ArDiffusion(GENERATOR), FlowScales(), VerifyScales(Dd1(STUDENT))):
        check_order("it", decoder, TEACHER)
    with pytest.raises(InputError, match="token by token"):
        check_order("verify", Verify(), TEACHER)
    with pytest.raises(InputError, match="scale by scale, without forced codes"):
        decode(VerifyScales(Given(torch.zeros(2, LENGTH)), SOLVER), request(forced_BL=torch.full((2, LENGTH), -1)))
