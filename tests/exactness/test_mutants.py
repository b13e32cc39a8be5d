"""The harness sees every known way to be slightly wrong (sjd.md section 5), and clears what only looks wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import arimg.accel.acceptance as acceptance
from arimg.accel.acceptance import RatioTest
from arimg.accel.base import Sampling
from arimg.accel.jacobi import Gsd, Scd, SpeculativeJacobi
from arimg.accel.target import filter_probs
from tests.exactness.harness import Enumeration, Law
from tests.exactness.mutants import (BlockTest, ForgottenLaw, GenerousMatch, MinCommit, MislabelledDraft, Multiplier,
                                     ReplacedSiblings, ResidualSiblings, SharedResidual, StaleLaw, StuckNoise,
                                     ThresholdReuse, Truncated)
from tests.exactness.tiny import Case

CODEBOOK = SimpleNamespace(scales=None, codebook_VC=0.1 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
LINE = Case(3, (1, 5), seed=2, space=CODEBOOK)
PAIR = Case(2, (1, 4), classes=(0, 1))


def with_rule(rule: acceptance.Acceptance) -> SpeculativeJacobi:
    return SpeculativeJacobi(rule, 3, "carry-law")


BIASED: dict[str, tuple[Callable[[], SpeculativeJacobi], Case]] = {
    "old law of kept drafts": (lambda: StaleLaw(3), LINE),
    "old law of replaced drafts": (lambda: ForgottenLaw(3), LINE),
    "siblings from the residual": (lambda: ResidualSiblings(3, siblings=1), LINE),
    "siblings as if with replacement": (lambda: ReplacedSiblings(3, siblings=1), LINE),
    "block verification, coupled tail": (lambda: with_rule(BlockTest(coupled=True)), LINE),
    "reuse above a ratio": (lambda: with_rule(ThresholdReuse(ratio=0.8)), LINE),
    "reuse above a probability": (lambda: with_rule(ThresholdReuse(confidence=0.5)), LINE),
    "window cut by value": (lambda: Truncated(3, by_value=True), LINE),
    "common commit, old law": (lambda: MinCommit(3, stale=True), PAIR),
    "uniform draft called something else": (lambda: SpeculativeJacobi(RatioTest("max"), 3, MislabelledDraft()), LINE),
    "one acceptance noise for all passes": (lambda: with_rule(StuckNoise("max")), LINE),
    "residual with the draft's own noise": (lambda: with_rule(SharedResidual()), LINE),
    "grouped test": (lambda: Gsd(3, "carry-law"), LINE),
    "multiplied acceptance": (lambda: with_rule(Multiplier("max")), LINE),
    "likely drafts kept by exact match": (lambda: with_rule(GenerousMatch()), LINE),
}
EXACT: dict[str, tuple[Callable[[], SpeculativeJacobi], Case]] = {
    "block verification, fresh tail": (lambda: with_rule(BlockTest(coupled=False)), LINE),
    "window cut by law": (lambda: Truncated(3, by_value=False), LINE),
    "common commit, new law": (lambda: MinCommit(3, stale=False), PAIR),
    # All drafts after the first failure are drawn anew, so no noise is used twice for the same draft.
    "one acceptance noise, fresh drafts": (lambda: with_rule(StuckNoise("fresh")), LINE),
}


def found(decoder: SpeculativeJacobi, case: Case) -> Law:
    law = Enumeration(decoder, case).law()
    assert abs(float(law.codes_C.sum()) - 1) < 1e-12
    return law


@pytest.mark.parametrize("make, case", BIASED.values(), ids=BIASED)
def test_bias_is_seen(make: Callable[[], SpeculativeJacobi], case: Case) -> None:
    assert found(make(), case).distance(case) > 1e-3


@pytest.mark.parametrize("make, case", EXACT.values(), ids=EXACT)
def test_exact_twins_pass(make: Callable[[], SpeculativeJacobi], case: Case) -> None:
    assert found(make(), case).distance(case) < 1e-10


def test_top_p_on_the_residual_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, residual = Sampling(top_p=0.7), acceptance.residual
    case = Case(4, (1, 4), sampling=sampling, seed=1)
    assert found(Scd(3), case).distance(case) < 1e-10

    def filtered(p_BWV: Tensor, q_BWV: Tensor) -> Tensor:
        return filter_probs(residual(p_BWV, q_BWV).log(), sampling)
    monkeypatch.setattr(acceptance, "residual", filtered)
    assert found(Scd(3), case).distance(case) > 1e-3


def test_no_residual_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "residual", lambda p_BWV, q_BWV: p_BWV)
    assert found(Scd(3), LINE).distance(LINE) > 1e-3
