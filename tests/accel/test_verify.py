"""The teacher's own sample for a noise, one token after the other and by verification of guesses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, Guidance, Sampling
from arimg.accel.dd1 import Dd1
from arimg.accel.flow import FlowSolver
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR, Verify
from arimg.errors import InputError
from arimg.noise import CounterNoise
from arimg.tokenizers.vq import VQSpace
from tests.chi_square import chi_square_p
from tests.exactness.tiny import Case
from tests.exactness.toy import attentive_model, faint_inject
from tests.models.toy import toy_classes, toy_codes
from tests.models.toy_students import LATENTS, toy_student

LENGTH, SOLVER = 16, FlowSolver(20)


def space(vocab: int, channels: int = LATENTS) -> VQSpace:
    return VQSpace(torch.randn(vocab, channels, generator=torch.Generator().manual_seed(0)))


def request(batch: int = 3, **changes: Any) -> DecodeRequest:
    settings: dict[str, Any] = {"guidance": Guidance(2.0), "sampling": Sampling(top_k=20), "space": space(32)} | changes
    return DecodeRequest(toy_classes(batch), (4, 4), torch.arange(batch), faint_inject(3)[:, :batch], **settings)


def decode(decoder: Decoder, asked: DecodeRequest) -> DecodeResult:
    return decoder.decode(Target(attentive_model(), asked), asked)


def codes_of(decoder: Decoder, asked: DecodeRequest) -> Tensor:
    codes_BL = decode(decoder, asked).codes_BL
    assert codes_BL is not None
    return codes_BL


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """The oracle's codes of `request()`."""
    return codes_of(FlowAR(SOLVER), request())


@pytest.mark.parametrize("window", [1, 3, 16, "auto"])
def test_a_students_codes_are_corrected_to_the_teachers_own(sample: Tensor, window: int | str) -> None:
    result = decode(Verify(Dd1(toy_student()), window, SOLVER), request())
    assert result.codes_BL is not None and torch.equal(result.codes_BL, sample)
    extra = result.stats.extra
    assert extra["draft_passes"] == 1 and extra["teacher_passes"] + 1 == result.stats.forward_passes
    assert extra["draft_agreement"] < 0.5, "an untrained student guesses badly"


def test_right_guesses_take_few_passes_and_wrong_ones_no_more_than_plain_decoding(sample: Tensor) -> None:
    right = decode(Verify(window=16, solver=SOLVER), request(draft_BL=sample))
    assert right.codes_BL is not None and torch.equal(right.codes_BL, sample) and right.stats.forward_passes == 2
    wrong = decode(Verify(window=16, solver=SOLVER), request(draft_BL=(sample + 1) % 32))
    assert wrong.codes_BL is not None and torch.equal(wrong.codes_BL, sample)
    assert wrong.stats.forward_passes <= LENGTH
    one_off = sample.clone()
    one_off[:, 9] = (one_off[:, 9] + 1) % 32
    assert decode(Verify(window=16, solver=SOLVER), request(draft_BL=one_off)).stats.forward_passes <= 1 + 16 - 9


def test_a_sample_depends_on_its_own_seed_alone(sample: Tensor) -> None:
    alone = codes_of(FlowAR(SOLVER), request(1))
    other_seeds = codes_of(FlowAR(SOLVER), replace(request(), seeds_B=torch.tensor([0, 8, 9])))
    assert torch.equal(alone, sample[:1]) and torch.equal(other_seeds[0], sample[0])
    assert not bool((other_seeds == sample)[1:].all(1).any())
    assert not torch.equal(codes_of(PlainAR(), request()), sample), "Gumbel noise gives other codes"


def test_the_run_handed_in_is_left_as_it_was(sample: Tensor) -> None:
    asked = request()
    target = Target(attentive_model(), asked)
    FlowAR(SOLVER).decode(target, asked)
    assert target.request is asked


def test_the_sample_has_the_teachers_joint_law() -> None:
    """All codes of three tokens over 8,000 seeds, guided and under control, one by one and verified."""
    count, case = 8_000, Case(3, (1, 3), (1,), Guidance(1.5), controlled=True, space=space(3, 2))
    asked = case.request(torch.zeros(count, dtype=torch.int64), CounterNoise())
    for decoder in (FlowAR(FlowSolver(40)), Verify(window=2, solver=FlowSolver(40))):
        codes_BL = decoder.decode(Target(case.net, asked), asked).codes_BL
        assert codes_BL is not None
        counts = torch.bincount((codes_BL * 3 ** torch.arange(2, -1, -1)).sum(1), minlength=27)
        assert chi_square_p(counts, case.chain_law) > 1e-3
        assert chi_square_p(counts, replace(case, classes=(2,)).chain_law) < 1e-9, "another law would pass too"


def test_forced_codes_and_missing_codebooks(sample: Tensor) -> None:
    forced = torch.full((3, LENGTH), -1)
    forced[:, 4] = toy_codes(3)[:, 4]
    for decoder in (FlowAR(SOLVER), Verify(window=4, solver=SOLVER)):
        codes_BL = codes_of(decoder, request(forced_BL=forced))
        assert torch.equal(codes_BL[:, 4], forced[:, 4])
        assert torch.equal(codes_BL[:, :4], sample[:, :4])
        with pytest.raises(InputError, match="codebook|code vectors"):
            decode(decoder, request(space=None))
