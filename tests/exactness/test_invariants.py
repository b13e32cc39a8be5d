"""What must hold in every pass of every decoder, on the real transformer at toy size in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, Guidance, Sampling
from arimg.accel.drafts import INITS
from arimg.accel.target import Target, branch_scales, filter_probs, mix
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from tests.exactness.test_same_law import DECODERS, Wave, every_decoder
from tests.exactness.toy import attentive_model, faint_inject
from tests.models.toy import toy_captions, toy_classes

GRID, LENGTH, BATCH = (4, 4), 16, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three branches": {"guidance": Guidance(3.0, 2.0)},
    "interval, filtered": {"guidance": Guidance(3.0, interval=(2, 9)), "sampling": Sampling(0.9, 20, 0.9)},
}
CLASS, TEXT = "class", "text"
every_setting = pytest.mark.parametrize("setting, conditioning", [
    *((setting, CLASS) for setting in SETTINGS.values()), (SETTINGS["three branches"], TEXT)],
    ids=[*SETTINGS, "three branches, text"])


def small_model(conditioning: str = CLASS) -> ARTransformer:
    return attentive_model(conditioning=conditioning, layers=2, inject_layers=(0, 1))


def request(condition: Condition, **changes: Any) -> DecodeRequest:
    return DecodeRequest(condition, GRID, 100 + torch.arange(BATCH), faint_inject(BATCH, points=2), **changes)


def rows_of(asked: DecodeRequest, rows: Sequence[int]) -> DecodeRequest:
    """These images of a request."""
    chosen, condition = list(rows), asked.condition
    assert asked.inject_KBLD is not None
    return replace(asked, condition=Condition(*(None if tensor is None else tensor[chosen] for tensor in (
        condition.class_ids_B, condition.caption_BPC, condition.caption_mask_BP))), seeds_B=asked.seeds_B[chosen],
        inject_KBLD=asked.inject_KBLD[:, chosen])


def decode(decoder: Decoder, model: ARTransformer, asked: DecodeRequest) -> Tensor:
    codes = decoder.decode(Target(model, asked), asked).codes_BL
    assert codes is not None
    return codes


@every_decoder
@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_k=1)], ids=["temperature 0", "top-k 1"])
def test_greedy_decoding_takes_the_likeliest_codes(name: str, sampling: Sampling) -> None:
    model, asked = small_model(), request(toy_classes(BATCH), guidance=Guidance(2.0, 3.0), sampling=sampling)
    expected = decode(PlainAR(), model, asked)
    assert torch.equal(fresh_laws(model, asked, expected).argmax(-1), expected)
    for init in INITS if sampling.temperature == 0 else ("carry-law",):
        assert torch.equal(decode(DECODERS[name](5, init), model, asked), expected), init


class Watched(Target):
    """Notes what passes read, and their laws."""

    def step(self, codes_BW: Tensor, positions_BW: Tensor, reached: int = 0, stop: int | None = None,
             leaves: int = 0) -> Tensor:
        """See Target."""
        p_BWV = super().step(codes_BW, positions_BW, reached, stop, leaves)
        self.read = codes_BW, positions_BW, p_BWV, leaves
        return p_BWV


def fresh_laws(model: ARTransformer, asked: DecodeRequest, codes_BL: Tensor) -> Tensor:
    """p_BLV of all positions, without a cache."""
    first, stop = asked.guidance.interval
    branches = {"full": model(codes_BL, asked.condition, asked.grid, asked.inject_KBLD),
                "class": model(codes_BL, asked.condition, asked.grid),
                "null": model(codes_BL, model.null(asked.condition), asked.grid)}
    scales = branch_scales(asked.guidance, controlled=True)
    guided_BLV = mix(torch.stack([branches[name] for name in scales]), scales)
    position_L = torch.arange(LENGTH)[:, None]
    inside_L1 = (position_L >= first) & (position_L < (LENGTH if stop is None else stop))
    return filter_probs(torch.where(inside_L1, guided_BLV, branches["full"]), asked.sampling)


@every_decoder
@pytest.mark.parametrize("setting, conditioning, window", [
    (SETTINGS["plain"], CLASS, 5), (SETTINGS["three branches"], TEXT, 5), (SETTINGS["interval, filtered"], CLASS, 5),
    (SETTINGS["three branches"], CLASS, Wave(6))], ids=["plain", "text", "interval, filtered", "varying width"])
@torch.no_grad()
def test_laws_are_those_of_a_pass_without_a_cache(name: str, setting: dict[str, Any], conditioning: str,
                                                  window: Any) -> None:
    model = small_model(conditioning)
    asked = request(toy_classes(BATCH) if conditioning == CLASS else toy_captions(BATCH), **setting)
    target, decoder = Watched(model, asked), DECODERS[name](window)
    run = decoder.begin(target, asked)
    while not run.done:
        final_BN = run.codes_BN.clone()
        decoder.advance(run)
        codes_BW, positions_BW, p_BWV, leaves = target.read
        width = codes_BW.shape[1] - leaves
        codes_BN = final_BN.scatter(1, positions_BW[:, :width], codes_BW[:, :width])
        expected_BLV = fresh_laws(model, asked, codes_BN[:, :LENGTH])
        for entry in range(codes_BW.shape[1]):
            if entry >= width:      # a leaf: another code at its position
                leaf_BN = codes_BN.scatter(1, positions_BW[:, entry:entry + 1], codes_BW[:, entry:entry + 1])
                expected_BLV = fresh_laws(model, asked, leaf_BN[:, :LENGTH])
            row_R = (positions_BW[:, entry] + 1 < LENGTH).nonzero()[:, 0]
            torch.testing.assert_close(p_BWV[row_R, entry], expected_BLV[row_R, positions_BW[row_R, entry] + 1],
                                       rtol=0, atol=1e-12)


@every_decoder
@every_setting
def test_an_image_does_not_depend_on_its_batch(name: str, setting: dict[str, Any], conditioning: str) -> None:
    model, decoder = small_model(conditioning), DECODERS[name](5)
    asked = request(toy_classes(BATCH) if conditioning == CLASS else toy_captions(BATCH), **setting)
    together = decode(decoder, model, asked)
    alone = torch.cat([decode(decoder, model, rows_of(asked, [row])) for row in (0, 2)])
    order = [2, 0, 3, 1]
    assert torch.equal(alone, together[[0, 2]])
    assert torch.equal(decode(decoder, model, rows_of(asked, order)), together[order])
    assert torch.equal(decode(decoder, model, rows_of(asked, [3, 3])), together[[3, 3]])
    assert len({tuple(row) for row in together.tolist()}) == BATCH


@every_decoder
def test_a_decoder_remembers_nothing(name: str) -> None:
    model, decoder = small_model(), DECODERS[name](5)
    asked = request(toy_classes(BATCH))
    first = decode(decoder, model, asked)
    decode(decoder, model, replace(asked, seeds_B=torch.arange(BATCH), inject_KBLD=None))
    assert torch.equal(decode(decoder, model, asked), first)


@every_decoder
def test_statistics_of_passes(name: str) -> None:
    model, asked = small_model(), request(toy_classes(BATCH))
    result = DECODERS[name](5).decode(Target(model, asked), asked)
    stats = result.stats
    assert len(stats.accepted_per_pass) == stats.forward_passes < LENGTH
    assert sum(stats.accepted_per_pass) == pytest.approx(LENGTH)
    fixed_at = torch.tensor(stats.extra["fixed_at"])
    assert fixed_at.shape == (BATCH, LENGTH) and bool((fixed_at.diff(dim=1) >= 0).all())
    assert bool((fixed_at[:, 0] == 1).all()) and int(fixed_at.max()) == stats.forward_passes
