"""Exact Jacobi decoding gives plain decoding's codes: float64, every draft, every window, every batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, DecodeResult, Guidance, Sampling
from arimg.accel.drafts import INITS, Blank, DraftInit
from arimg.accel.jacobi import Jacobi
from arimg.accel.target import Target
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from tests.exactness.toy import attentive_model
from tests.models.toy import CLASSES

GRID, LENGTH, VOCAB = (5, 5), 25, 16
POOL = 200          # seeds 0 .. 199
GUIDANCE = {"1": Guidance(), "3": Guidance(3.0), "3 and 2": Guidance(3.0, 2.0)}
WINDOWS = (1, 2, 4, 16, LENGTH)
DRAFTS = (*INITS, "external", "wrong")


@cache
def model() -> ARTransformer:
    return attentive_model(block_size=LENGTH, vocab_size=VOCAB, dim=16, layers=2, heads=2, ffn_hidden=24,
                           inject_layers=(0, 1))


@cache
def control() -> Tensor:
    """inject_KBLD of the pool."""
    return 0.3 * torch.randn(2, POOL, LENGTH, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@cache
def external_drafts() -> Tensor:
    """draft_BL of the pool: some right by chance, some missing."""
    return torch.randint(-1, VOCAB, (POOL, LENGTH), generator=torch.Generator().manual_seed(1))


def request(seeds: range, **changes: Any) -> DecodeRequest:
    """These images of the pool, under control."""
    seeds_B = torch.tensor(seeds)
    return DecodeRequest(Condition(class_ids_B=seeds_B % CLASSES), GRID, seeds_B, control()[:, seeds_B], **changes)


def codes_of(result: DecodeResult) -> Tensor:
    assert result.codes_BL is not None
    return result.codes_BL


@cache
def plain_codes(guidance: Guidance, sampling: Sampling = Sampling()) -> Tensor:
    """codes_BL of the pool."""
    asked = request(range(POOL), guidance=guidance, sampling=sampling)
    return codes_of(PlainAR().decode(Target(model(), asked), asked))


class WrongDrafts:
    """Never draws the right code. Rows are told apart by their seeds."""

    def __init__(self, right_BL: Tensor) -> None:
        self.right_BL = right_BL

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        right_BW = self.right_BL[blank.request.seeds_B].gather(1, blank.positions_BW.clamp_max(LENGTH - 1))
        return (right_BW + 1) % VOCAB, None


def jacobi(seeds: range, window: int, drafts: str, guidance: Guidance) -> DecodeResult:
    init: str | DraftInit = drafts
    asked = request(seeds, guidance=guidance)
    if drafts == "external":
        init, asked = "repeat-up", replace(asked, draft_BL=external_drafts()[asked.seeds_B])
    elif drafts == "wrong":
        init = WrongDrafts(plain_codes(guidance))
    return Jacobi(window, init).decode(Target(model(), asked), asked)


def combinations() -> Iterator[Any]:
    """Batches of 1, 3, 20 and all 200, for every window and every draft; what is left out of the quick run is slow."""
    for window in WINDOWS:
        for drafts in DRAFTS if window > 1 else ("carry-law",):
            for seeds in (range(0, 1), range(1, 4), range(4, 24), range(24, 25), range(25, 28), range(POOL)):
                quick = seeds[-1] < 24 and (drafts in ("carry-law", "wrong") or len(seeds) == 20 and window > 2)
                yield pytest.param(window, drafts, seeds, marks=() if quick else pytest.mark.slow,
                                   id=f"{window}-{drafts}-{len(seeds)} from {seeds[0]}")


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize("window, drafts, seeds", list(combinations()))
def test_same_codes(window: int, drafts: str, seeds: range, guidance: Guidance) -> None:
    result = jacobi(seeds, window, drafts, guidance)
    assert torch.equal(codes_of(result), plain_codes(guidance)[list(seeds)])
    assert math.ceil((LENGTH - 1) / window) + 1 <= result.stats.forward_passes <= LENGTH
    assert window > 1 or result.stats.forward_passes == LENGTH


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_the_model_makes_it_hard(guidance: Guidance) -> None:
    """Later codes hang on earlier ones, so drafts must be revised."""
    forced = torch.full((20, LENGTH), -1)
    forced[:, :3] = (plain_codes(guidance)[:20, :3] + 1) % VOCAB
    asked = request(range(20), guidance=guidance, forced_BL=forced)
    codes = codes_of(PlainAR().decode(Target(model(), asked), asked))
    assert float((codes != plain_codes(guidance)[:20])[:, 3:].double().mean()) > 0.4
    fixed_at = jacobi(range(20), LENGTH, "carry-law", guidance).stats.extra["fixed_at"]
    assert sum(row[-1] for row in fixed_at) / 20 > 8


@pytest.mark.parametrize("window", WINDOWS)
def test_right_drafts_take_the_fewest_passes(window: int) -> None:
    asked = request(range(20), guidance=GUIDANCE["3 and 2"], draft_BL=plain_codes(GUIDANCE["3 and 2"])[:20])
    result = Jacobi(window).decode(Target(model(), asked), asked)
    assert torch.equal(codes_of(result), plain_codes(GUIDANCE["3 and 2"])[:20])
    assert result.stats.forward_passes == 1 + math.ceil((LENGTH - 1) / window)


@pytest.mark.parametrize("changes", [
    {"sampling": Sampling(0.8, 5, 0.9)}, {"sampling": Sampling(0.0)}, {"sampling": Sampling(top_k=1)},
    {"guidance": Guidance(4.0, 2.0, (3, 11))}, {"guidance": Guidance(2.0, interval=(0, 7))},
    {"guidance": Guidance(0.0)}, {"guidance": Guidance(2.0, 0.0)},
], ids=str)
@pytest.mark.parametrize("window", [4, "auto"])
def test_same_codes_in_other_settings(window: int | str, changes: dict[str, Any]) -> None:
    asked = request(range(8), **{"guidance": Guidance(2.0, 3.0), **changes})
    expected = PlainAR().decode(Target(model(), asked), asked)
    assert torch.equal(codes_of(Jacobi(window).decode(Target(model(), asked), asked)), codes_of(expected))


@pytest.mark.parametrize("window", [3, 16])
def test_same_codes_with_forced_ones(window: int) -> None:
    forced = torch.full((6, LENGTH), -1)
    forced[0, :9] = external_drafts()[0, :9].clamp_min(0)
    forced[1, 5], forced[2, LENGTH - 1], forced[3, 0] = 3, 4, 5
    forced[4] = plain_codes(Guidance(2.0))[4]
    asked = request(range(6), guidance=Guidance(2.0), forced_BL=forced)
    expected = codes_of(PlainAR().decode(Target(model(), asked), asked))
    assert torch.equal(codes_of(Jacobi(window).decode(Target(model(), asked), asked)), expected)
    asked = replace(asked, draft_BL=external_drafts()[:6])
    assert torch.equal(codes_of(Jacobi(window, "table").decode(Target(model(), asked), asked)), expected)
    assert torch.equal(expected[forced >= 0], forced[forced >= 0])


def test_same_codes_on_another_grid() -> None:
    for grid in ((1, 1), (1, 2), (1, 9), (9, 1), (3, 7)):
        count = grid[0] * grid[1]
        asked = replace(request(range(5), guidance=Guidance(2.0)), grid=grid, inject_KBLD=control()[:, :5, :count])
        expected = codes_of(PlainAR().decode(Target(model(), asked), asked))
        for drafts in ("repeat-up", "carry-law", "table"):
            result = Jacobi(4, drafts).decode(Target(model(), asked), asked)
            assert torch.equal(codes_of(result), expected), (grid, drafts)
