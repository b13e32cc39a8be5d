"""DD2's networks: what each output may depend on, where control acts, and what a new one takes from its teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, Sampling, StepInfo
from arimg.accel.dd2 import ArDiffusion, Dd2, ar_diffusion, shifted
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Condition
from arimg.models.generators import ARGenerator, ARGeneratorConfig
from arimg.presets import AR_PRESETS
from arimg.tokenizers.vq import VQSpace
from tests.exactness.toy import attentive_model
from tests.models.toy import toy_captions, toy_classes, toy_inject, toy_model
from tests.models.toy_students import LATENTS, moved, perturb, toy_latents

GRID, LENGTH = (4, 4), 16
SPACE = VQSpace(torch.randn(32, LATENTS, generator=torch.Generator().manual_seed(0)))
HEAD = {"head_width": 16, "head_depth": 2}


def double(condition: Condition) -> Condition:
    if condition.caption_BPC is None:
        return condition
    return Condition(caption_BPC=condition.caption_BPC.double(), caption_mask_BP=condition.caption_mask_BP)


CONDITIONS = {"class": toy_classes(2), "text": double(toy_captions(2))}


def toy_generator(**changes: Any) -> Any:
    return perturb(ARGenerator.from_teacher(toy_model(**changes), LATENTS, **HEAD))


@torch.no_grad()
def tokens(generator: Any, noise: Tensor, condition: Condition, inject: Tensor | None = None) -> Tensor:
    """tokens_BLC of one step."""
    result: Tensor = generator(shifted(noise, SPACE), noise, condition, GRID, inject)
    return result


@torch.no_grad()
def test_time_scale() -> None:
    generator = toy_generator()
    noise, feature, t = toy_latents(1), torch.randn(1, LENGTH, generator.config.dim).double(), torch.rand(1, LENGTH, 1)
    twice = ARGenerator(replace(generator.config, time_scale=2000.0)).double()
    twice.load_state_dict(generator.state_dict())
    torch.testing.assert_close(twice.velocity(noise, t / 2, feature), generator.velocity(noise, t, feature))


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("j", [0, 6, 15])
def test_noise_tokens_and_control_move_nothing_before_them(kind: str, j: int) -> None:
    generator, condition = toy_generator(conditioning=kind), CONDITIONS[kind]
    noise, inject = toy_latents(2), toy_inject(2).double()
    before = tokens(generator, noise, condition, inject)
    other_noise, other_inject = noise.clone(), inject.clone()
    other_noise[:, j] += 0.5
    other_inject[:, :, j] += 0.5
    assert moved(before, tokens(generator, other_noise, condition, inject)) == list(range(j, LENGTH))
    assert moved(before, tokens(generator, noise, condition, other_inject)) == list(range(j, LENGTH))
    with torch.no_grad():
        features = [generator.features(shifted(one, SPACE), condition, GRID) for one in (noise, other_noise)]
    assert moved(*features) == list(range(j + 1, LENGTH)), "a feature sees the tokens before its own alone"


def test_control_acts_where_the_teachers_does() -> None:
    generator, noise = toy_generator(), toy_latents(2)
    inject = torch.zeros(3, 2, LENGTH, 32).double()
    inject[:, :, 7] = 1
    plain = tokens(generator, noise, toy_classes(2))
    assert moved(plain, tokens(generator, noise, toy_classes(2), inject))[0] == 7
    assert moved(plain, tokens(generator, noise, toy_classes(2), inject.roll(1, dims=2)))[0] == 8


def test_a_new_network_takes_all_but_reader_and_head_from_its_teacher() -> None:
    teacher = toy_model()
    generator = ARGenerator.from_teacher(teacher, LATENTS, **HEAD)
    given, own = teacher.state_dict(), generator.backbone.state_dict()
    fresh = {"tok_embeddings.fc1.weight", "tok_embeddings.fc2.weight"}
    assert set(own) == set(given) - {"tok_embeddings.weight", "output.weight"} | fresh
    assert all(torch.equal(own[name], given[name]) for name in set(own) - fresh)
    tied = ARGenerator.from_teacher(toy_model(codebook_dim=LATENTS), LATENTS, **HEAD)
    assert set(tied.backbone.state_dict()) == set(own)


def test_parameters_of_the_papers_sizes() -> None:
    """335 M is what the paper says of LlamaGen-L; a head of width 1024 and depth 4 gives it."""
    with torch.device("meta"):
        generator = ARGenerator(ARGeneratorConfig(**AR_PRESETS["L"].config(latent_dim=8)))
    assert sum(parameter.numel() for parameter in generator.parameters()) == 335_892_488


def request(**changes: Any) -> DecodeRequest:
    settings: dict[str, Any] = {"space": SPACE, "inject_KBLD": toy_inject(2).double(), **changes}
    return DecodeRequest(toy_classes(2), GRID, torch.arange(2), **settings)


def test_decoding_in_one_pass() -> None:
    steps: list[StepInfo] = []
    asked = request()
    result = Dd2(toy_generator()).decode(Target(attentive_model(), asked), asked, steps.append)
    assert result.codes_BL is not None and result.latents_BLC is not None
    assert result.stats.forward_passes == 1 == len(steps)
    assert torch.equal(result.codes_BL, SPACE.nearest(result.latents_BLC))


def test_the_teacher_draws_the_last_units_anew() -> None:
    asked = request(sampling=Sampling(temperature=0))
    generator, teacher = toy_generator(), attentive_model()
    plain = Dd2(generator).decode(Target(teacher, asked), asked).codes_BL
    result = Dd2(generator, teacher_from=12).decode(Target(teacher, asked), asked)
    assert plain is not None and result.codes_BL is not None
    assert torch.equal(result.codes_BL[:, :12], plain[:, :12]) and result.stats.forward_passes == 1 + 1 + 4
    logits = teacher(result.codes_BL, toy_classes(2), GRID, toy_inject(2).double())
    assert torch.equal(result.codes_BL[:, 12:], logits[:, 12:].argmax(-1))


@torch.no_grad()
def test_ar_diffusion_of_one_step_is_the_one_step_sample_of_its_own_prefix() -> None:
    """Every token's flow starts from its noise and its feature; one Euler step is the head at t = 1."""
    asked, generator, noise = request(), toy_generator(), toy_latents(2)
    sample = ar_diffusion(generator, noise, asked, steps=1)
    features = generator.features(shifted(sample, SPACE), asked.condition, GRID, asked.inject_KBLD)
    again = noise - generator.velocity(noise, torch.ones_like(noise[..., :1]), features)
    torch.testing.assert_close(again, sample)
    result = ArDiffusion(generator, steps=3).decode(Target(attentive_model(), asked), asked)
    assert result.stats.forward_passes == LENGTH and result.codes_BL is not None


def test_impossible_requests() -> None:
    with pytest.raises(InputError, match="teacher_from 0"):
        Dd2(toy_generator(), 0)
    for decoder, changes, message in ((Dd2(toy_generator(), 16), {}, "16 units"),
                                      (Dd2(toy_generator()), {"space": None}, "no codebook"),
                                      (Dd2(toy_generator()), {"forced_BL": torch.zeros(2, 16)}, "forced codes")):
        asked = request(**changes)
        with pytest.raises(InputError, match=message):
            decoder.decode(Target(attentive_model(), asked), asked)
