"""Next-scale decoding: its law by enumeration, the guidance ramp, what depends on what, forced codes, soft choices."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.audit import audit
from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.find import find_decoder
from arimg.accel.scale import ScaleByScale, SmoothScales, latent_map, scale_inputs
from arimg.accel.target import Target, filter_probs
from arimg.errors import InputError
from arimg.models.base import Condition
from arimg.models.var import VARTransformer
from tests.chi_square import chi_square_p
from tests.models.toy_var import ENDS, LENGTH, SCALES, ToySpace, toy_classes, toy_inject, toy_space, toy_var

TINY = ((1, 1), (1, 2))
TINY_SIZES: dict[str, Any] = dict(vocab_size=3, scales=TINY, layers=2, inject_layers=(0,))
SAMPLES = 6000


def request(batch: int = 2, space: ToySpace | None = None, first_seed: int = 0, **changes: Any) -> DecodeRequest:
    space = toy_space() if space is None else space
    condition = changes.pop("condition", toy_classes(batch))
    seeds = torch.arange(first_seed, first_seed + batch)
    return DecodeRequest(condition, space.scales[-1], seeds, space=space, **changes)


def decode(model: VARTransformer, asked: DecodeRequest) -> Tensor:
    codes = ScaleByScale().decode(Target(model, asked), asked).codes_BL
    assert codes is not None
    return codes


@torch.no_grad()
def plain_logits(model: VARTransformer, codes: Tensor, condition: Condition, space: ToySpace,
                 inject: Tensor | None = None) -> Tensor:
    """One branch, teacher-forced."""
    return model(scale_inputs(space.codebook_VC[codes], space), condition, inject)


@torch.no_grad()
def target_logits(model: VARTransformer, codes: Tensor, asked: DecodeRequest) -> Tensor:
    """Guided logits_BLV from the decoder's own passes."""
    assert isinstance(asked.space, ToySpace)
    target, logits = Target(model, asked), list[Tensor]()
    cells = scale_inputs(asked.space.codebook_VC[codes], asked.space)
    logits.append(target.start_logits())
    for start, stop in zip(ENDS[1:], ENDS[2:]):
        logits.append(target.read_logits(cells[:, start - ENDS[1]:stop - ENDS[1]], start))
    return torch.cat(logits, dim=1)


def ramp() -> Tensor:
    """k / (S-1) of every token, (L, 1)."""
    return torch.cat([torch.full((stop - start, 1), k / 2) for k, (start, stop) in enumerate(zip(ENDS, ENDS[1:]))])


def codes_of(batch: int, seed: int = 4) -> Tensor:
    return torch.randint(0, 20, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cfg", [0.0, 1.0, 2.5])
def test_guidance_ramps_up_over_the_scales(cfg: float) -> None:
    """(1 + t) cond - t null with t = (cfg - 1) k / (S - 1)."""
    model, codes, space = toy_var().double(), codes_of(2), toy_space()
    cond = plain_logits(model, codes, toy_classes(2), space)
    null = plain_logits(model, codes, model.null(toy_classes(2)), space)
    t = (cfg - 1) * ramp()
    got = target_logits(model, codes, request(guidance=Guidance(cfg)))
    torch.testing.assert_close(got, (1 + t) * cond - t * null)


@pytest.mark.parametrize("cfg, control_cfg", [(2.0, 3.0), (1.0, 2.0), (3.0, 0.0), (2.0, None)])
def test_control_has_its_own_guidance_on_the_ramp(cfg: float, control_cfg: float | None) -> None:
    model, codes, space, inject = toy_var().double(), codes_of(2), toy_space(), toy_inject(2).double()
    full = plain_logits(model, codes, toy_classes(2), space, inject)
    plain = plain_logits(model, codes, toy_classes(2), space)
    null = plain_logits(model, codes, model.null(toy_classes(2)), space)
    w_class, w_full = 1 + (cfg - 1) * ramp(), 1 + ((cfg if control_cfg is None else control_cfg) - 1) * ramp()
    got = target_logits(model, codes, request(inject_KBLD=inject, guidance=Guidance(cfg, control_cfg)))
    torch.testing.assert_close(got, null + w_class * (plain - null) + w_full * (full - plain))


def test_an_interval_limits_the_ramp() -> None:
    model, codes, space = toy_var().double(), codes_of(2), toy_space()
    got = target_logits(model, codes, request(guidance=Guidance(3.0, interval=(0, 7))))
    whole = target_logits(model, codes, request(guidance=Guidance(3.0)))
    torch.testing.assert_close(got[:, :7], whole[:, :7])
    torch.testing.assert_close(got[:, 7:], plain_logits(model, codes, toy_classes(2), space)[:, 7:])


@pytest.mark.parametrize("guidance, sampling, controlled", [
    (Guidance(), Sampling(), False), (Guidance(2.0), Sampling(temperature=0.8, top_k=2), True),
    (Guidance(2.0, 3.0), Sampling(top_p=0.8), True)])
def test_codes_follow_the_chain_law(guidance: Guidance, sampling: Sampling, controlled: bool) -> None:
    """All 27 pictures of three tokens, whose probabilities come from teacher-forced passes of each branch."""
    model, space = toy_var(**TINY_SIZES).double(), toy_space(3, scales=TINY)
    inject = toy_inject(1, 3, 1).double() if controlled else None
    pictures = torch.tensor(list(product(range(3), repeat=3)))
    law = chain_law(model, space, pictures, guidance, sampling, inject)
    assert float(law.sum()) == pytest.approx(1)
    asked = request(SAMPLES, space, guidance=guidance, sampling=sampling,
                    condition=Condition(class_ids_B=torch.zeros(SAMPLES, dtype=torch.int64)),
                    inject_KBLD=None if inject is None else inject.expand(-1, SAMPLES, -1, -1))
    counts = torch.bincount(decode(model, asked) @ torch.tensor([9, 3, 1]), minlength=27)
    assert chi_square_p(counts, law) > 1e-3
    if guidance.cfg > 1:
        steady = chain_law(model, space, pictures, guidance, sampling, inject, ramp=torch.ones(3, 1))
        assert chi_square_p(counts, steady) < 1e-6, "guidance without the ramp is another law"


def chain_law(model: VARTransformer, space: ToySpace, pictures: Tensor, guidance: Guidance, sampling: Sampling,
              inject: Tensor | None, ramp: Tensor = torch.tensor([[0.0], [1.0], [1.0]])) -> Tensor:
    """Probability of each row of codes."""
    rows, classes = len(pictures), Condition(class_ids_B=torch.zeros(len(pictures), dtype=torch.int64))
    inject = None if inject is None else inject.expand(-1, rows, -1, -1)
    full = plain_logits(model, pictures, classes, space, inject)
    plain = plain_logits(model, pictures, classes, space)
    null = plain_logits(model, pictures, model.null(classes), space)
    control_cfg = guidance.cfg if guidance.control_cfg is None else guidance.control_cfg
    guided = null + (1 + (guidance.cfg - 1) * ramp) * (plain - null) + (1 + (control_cfg - 1) * ramp) * (full - plain)
    p = filter_probs(guided, sampling)
    return p.gather(-1, pictures[..., None])[..., 0].prod(-1)


@pytest.mark.parametrize("token", range(LENGTH))
def test_a_token_moves_the_laws_of_finer_scales_alone(token: int) -> None:
    model, codes = toy_var().double(), codes_of(1)
    other = codes.clone()
    other[:, token] = (other[:, token] + 1) % 20
    asked = request(1, guidance=Guidance(2.0))
    moved = (target_logits(model, codes, asked) != target_logits(model, other, asked)).any(-1)[0]
    scale = next(k for k, stop in enumerate(ENDS[1:]) if token < stop)
    assert moved.nonzero().flatten().tolist() == list(range(ENDS[scale + 1], LENGTH))


def test_a_picture_depends_on_its_own_seed_alone() -> None:
    model, inject = toy_var().double(), toy_inject(4).double()
    together = decode(model, request(4, inject_KBLD=inject, guidance=Guidance(2.0)))
    for row in (0, 3):
        alone = request(1, first_seed=row, inject_KBLD=inject[:, row:row + 1], guidance=Guidance(2.0),
                        condition=Condition(class_ids_B=torch.tensor([row])))
        assert torch.equal(decode(model, alone)[0], together[row])


def test_forced_scales_cost_no_passes_and_change_nothing_else() -> None:
    model, asked = toy_var().double(), request(2, guidance=Guidance(2.0))
    free = decode(model, asked)
    for known, passes in ((0, 3), (1, 3), (2, 2), (3, 1)):
        forced = free.clone()
        forced[:, ENDS[known]:] = -1
        result = ScaleByScale().decode(Target(model, asked), request(2, guidance=Guidance(2.0), forced_BL=forced))
        assert result.codes_BL is not None and torch.equal(result.codes_BL, free)
        assert result.stats.forward_passes == passes
    single = torch.full_like(free, -1)
    single[:, 2] = (free[:, 2] + 1) % 20
    changed = decode(model, request(2, guidance=Guidance(2.0), forced_BL=single))
    assert torch.equal(changed[:, 2], single[:, 2]) and torch.equal(changed[:, [0, 1, 3, 4]], free[:, [0, 1, 3, 4]])


def test_steps_are_reported_scale_by_scale() -> None:
    seen: list[tuple[int, int, int]] = []
    asked = request(2)
    stats = ScaleByScale().decode(Target(toy_var().double(), asked), asked, lambda info: seen.append(
        (info.forward_pass, info.fixed_tokens, info.total_tokens))).stats
    assert seen == [(1, 2, 22), (2, 10, 22), (3, 22, 22)] and stats.accepted_per_pass == (1.0, 4.0, 6.0)


def test_soft_choices_become_hard_as_the_law_does() -> None:
    model, space = toy_var().double(), toy_space()
    certain = request(2, sampling=Sampling(temperature=0.0))
    result = SmoothScales().decode(Target(model, certain), certain)
    assert result.codes_BL is not None and result.latents_BLC is not None
    assert torch.equal(result.codes_BL, decode(model, certain))
    torch.testing.assert_close(result.latents_BLC, space.codebook_VC[result.codes_BL])
    soft = SmoothScales().decode(Target(model, request(2)), request(2)).latents_BLC
    assert soft is not None and float((soft[..., None, :] - space.codebook_VC).norm(dim=-1).amin(-1).max()) > 1e-3
    with pytest.raises(InputError, match="does not keep the model's law"):
        find_decoder("scale-smooth", model, {})


def test_soft_choices_follow_the_formula() -> None:
    asked, p = request(2), torch.tensor([0.5, 0.5, 0.0] + [0.0] * 17).double().expand(2, 4, -1)
    positions = torch.arange(1, 5).expand(2, -1)
    noise = asked.noise.gumbel(asked.seeds_B, positions, 20)[..., :2].double()
    for k, tau in ((0, 0.27), (1, 0.14175), (2, 0.0135)):
        first = ((noise[..., 0] - noise[..., 1]) / tau).sigmoid()[..., None]
        assert asked.space is not None
        expected = first * asked.space.codebook_VC[0] + (1 - first) * asked.space.codebook_VC[1]
        got = SmoothScales().vectors(p, torch.zeros(2, 4, dtype=torch.int64), positions, k, asked)
        torch.testing.assert_close(got, expected)


def test_inputs_and_maps_agree_with_the_space() -> None:
    space, codes = toy_space(), codes_of(2)
    vectors = space.codebook_VC[codes]
    first = space.accumulate(None, vectors[:, :1], 0)
    second = space.accumulate(first, vectors[:, 1:5], 1)
    expected = torch.cat([space.next_input(first, 1), space.next_input(second, 2)], dim=1)
    torch.testing.assert_close(scale_inputs(vectors, space), expected)
    torch.testing.assert_close(latent_map(vectors, SCALES[-1], space), space.accumulate(second, vectors[:, 5:], 2))


def test_the_audit_knows_scales() -> None:
    model, asked = toy_var().double(), request(8, guidance=Guidance(2.0))
    assert audit(model, asked, decode(model, asked)).lawful
    strangers = torch.full((8, LENGTH), 3)
    assert not audit(model, asked, strangers).lawful


def test_a_tokenizer_of_one_scale_is_refused() -> None:
    one = DecodeRequest(toy_classes(1), (2, 3), torch.arange(1))
    with pytest.raises(InputError, match="one scale"):
        ScaleByScale().decode(Target(toy_var(), one), one)


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.75, 0.95])
def test_top_p_from_below(top_p: float) -> None:
    """The tail of the least likely codes that holds at most 1 - p goes, lower ids of equal ones first."""
    logits = torch.tensor([[0.1, 0.2, 0.2, 0.4, 0.05, 0.05]]).log()[None]
    kept = set(range(6))
    held = 0.0
    for code in sorted(range(6), key=lambda code: (float(logits[0, 0, code]), code))[:-1]:
        held += float(logits[0, 0, code].exp())
        if held <= 1 - top_p + 1e-7:
            kept.discard(code)
    p = filter_probs(logits.double(), Sampling(top_p=top_p), from_below=True)
    assert set(p[0, 0].nonzero().flatten().tolist()) == kept and float(p.sum()) == pytest.approx(1)
