"""Acceptance rules on laws and noise written by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.acceptance import (Draws, ExactMatch, GroupedRatioTest, RatioTest, Verdict, Window, at_codes, leading,
                                    one_hot, residual)
from arimg.accel.base import DecodeRequest
from arimg.errors import InputError, UnknownNameError
from arimg.models.base import Condition
from arimg.noise import CounterNoise, Purpose

P = [0.5, 0.3, 0.2]


def laws(*rows: list[float]) -> Tensor:
    """(1, W, V)."""
    return torch.tensor([rows], dtype=torch.float64)


class Script:
    """Noise that is given: `accept` and `pick` are the uniform numbers behind tests and draws. Notes what was asked."""

    def __init__(self, accept: list[float], pick: list[float]) -> None:
        self.accept, self.pick = torch.tensor([accept]), torch.tensor([pick])
        self.drawn: dict[tuple[Purpose, int], Tensor] = {}
        self.chances = torch.empty(0)

    def categorical(self, p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.SAMPLE,
                    draw: int = 0) -> Tensor:
        """See CounterNoise."""
        self.drawn[purpose, draw] = p_BWV
        return (p_BWV.cumsum(-1) < self.pick[..., None]).sum(-1)

    def bernoulli(self, p_BW: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.ACCEPT,
                  draw: int = 0) -> Tensor:
        """See CounterNoise."""
        assert (purpose, draw) == (Purpose.ACCEPT, 7)
        self.chances = p_BW
        return self.accept <= p_BW


def draws(noise: Any, width: int, space: Any = None) -> Draws:
    request = DecodeRequest(Condition(class_ids_B=torch.tensor([0])), (1, 99), torch.tensor([0]), noise=noise,
                            space=space)
    return Draws(request, 10 + torch.arange(width)[None], turn=7)


def window(p: Tensor, drafts: list[int], q: Tensor | None, drafted: int | None = None) -> Window:
    """The last position has no draft, unless `drafted` says how many have."""
    count = len(drafts) - 1 if drafted is None else drafted
    return Window(p, torch.tensor([drafts]), torch.arange(len(drafts))[None] < count, q)


def drawn_laws(noise: Script, purpose: Purpose = Purpose.RESIDUAL, draw: int = 7) -> list[list[float]]:
    return [[round(chance, 6) for chance in law] for law in noise.drawn[purpose, draw][0].tolist()]


@pytest.mark.parametrize("p, q, expected", [
    ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [1, 0, 0]),
    ([0.5, 0.25, 0.25], [0.25, 0.125, 0.625], [2 / 3, 1 / 3, 0]),
    (P, P, P),                                              # p == q: nothing is ever rejected; the law does not matter
    (P, [0, 0, 0], P),                                      # no draft
    (P, [0, 1, 0], [5 / 7, 0, 2 / 7]),                      # a certain draft: p without it
    ([0, 1, 0], [0, 1, 0], [0, 1, 0]),
    ([0, 1, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]),
    ([1, 0, 0], [0, 0.5, 0.5], [1, 0, 0]),
])
def test_residual(p: list[float], q: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(residual(laws(p), laws(q)), laws(expected))


def test_rejection_and_residual_give_p_back() -> None:
    """q min(1, p/q) + P(rejection) * residual = p."""
    p, q = torch.rand(2, 50, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    accepted = torch.minimum(p, q)
    torch.testing.assert_close(accepted + (1 - accepted.sum(-1, keepdim=True)) * residual(p, q), p)


def test_small_tools() -> None:
    assert leading(torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()).tolist() == [2, 0, 4]
    assert at_codes(laws(P, P), torch.tensor([[2, 0]])).tolist() == [[0.2, 0.5]]
    assert one_hot(torch.tensor([[1]]), laws(P)).tolist() == [[[0, 1, 0]]]


# Four positions; every draft is code 0 with p = 0.2 and q = 0.4, so each stays if its number is at most 0.5.
FLAT_P, FLAT_Q = laws(*[[0.2, 0.3, 0.5]] * 4), laws(*[[0.4, 0.3, 0.3]] * 4)
LEFT = [0.0, 0.0, 1.0]          # norm(max(0, p - q))


def flat(coupling: Any, accept: list[float], pick: list[float]) -> tuple[Verdict, Script]:
    noise = Script(accept, pick)
    verdict = RatioTest(coupling).judge(window(FLAT_P, [0, 0, 0, 0], FLAT_Q), draws(noise, 4))
    torch.testing.assert_close(noise.chances[:, :3], torch.full((1, 3), 0.5, dtype=torch.float64))
    return verdict, noise


def test_fresh_coupling_draws_everything_after_the_first_failure_anew() -> None:
    verdict, noise = flat("fresh", accept=[0.4, 0.6, 0.1, 0.0], pick=[0.9, 0.1, 0.45, 0.45])
    assert verdict.kept_B.tolist() == [1]
    assert drawn_laws(noise) == [[1, 0, 0], LEFT, [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]
    assert verdict.codes_BW.tolist() == [[0, 2, 1, 1]]


def test_maximal_coupling_goes_on_with_the_test() -> None:
    verdict, noise = flat("max", accept=[0.4, 0.6, 0.1, 0.0], pick=[0.9, 0.1, 0.45, 0.45])
    assert verdict.kept_B.tolist() == [1]
    assert drawn_laws(noise) == [[1, 0, 0], LEFT, [1, 0, 0], [0.2, 0.3, 0.5]]
    assert verdict.codes_BW.tolist() == [[0, 2, 0, 1]]
    verdict, noise = flat("max", accept=[0.6, 0.4, 0.6, 0.0], pick=[0.1, 0.1, 0.1, 0.1])
    assert verdict.kept_B.tolist() == [0]
    assert drawn_laws(noise)[1:3] == [[1, 0, 0], LEFT]
    assert verdict.codes_BW.tolist() == [[2, 0, 2, 0]]


def test_gumbel_coupling_shares_the_noise_of_plain_decoding() -> None:
    verdict, noise = flat("gumbel", accept=[0.4, 0.6, 0.1, 0.0], pick=[0.9, 0.1, 0.45, 0.9])
    assert verdict.kept_B.tolist() == [1]
    assert drawn_laws(noise)[:2] == [[1, 0, 0], LEFT]
    assert drawn_laws(noise, Purpose.SAMPLE, 0) == [[0.2, 0.3, 0.5]] * 4
    assert verdict.codes_BW.tolist() == [[0, 2, 1, 2]]


@pytest.mark.parametrize("coupling", ["fresh", "max", "gumbel"])
def test_when_all_drafts_hold_the_last_code_comes_from_p(coupling: str) -> None:
    verdict, noise = flat(coupling, accept=[0.5, 0.5, 0.5, 0.0], pick=[0.9, 0.9, 0.9, 0.3])
    assert verdict.kept_B.tolist() == [3]
    assert drawn_laws(noise) == [[1, 0, 0]] * 3 + [[0.2, 0.3, 0.5]]
    assert verdict.codes_BW.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("coupling", ["fresh", "max", "gumbel"])
def test_certain_laws(coupling: str) -> None:
    """q certain of the draft: accepted with p(d). p certain of the draft: always accepted; of another code: never."""
    p = laws([0.3, 0.7, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], P)
    q = laws([1.0, 0.0, 0.0], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    noise = Script([0.29, 1.0, 1e-9, 0.0], [0.5] * 4)
    verdict = RatioTest(coupling).judge(window(p, [0, 0, 0, 0], q), draws(noise, 4))        # type: ignore[arg-type]
    torch.testing.assert_close(noise.chances[:, :3], torch.tensor([[0.3, 4.0, 0.0]], dtype=torch.float64))
    assert verdict.kept_B.tolist() == [2] and verdict.codes_BW[0, :3].tolist() == [0, 0, 2]


def test_equal_laws_are_always_accepted() -> None:
    noise = Script([1.0] * 4, [0.1] * 4)
    verdict = RatioTest("max").judge(window(FLAT_Q, [2, 1, 0, 0], FLAT_Q), draws(noise, 4))
    assert verdict.kept_B.tolist() == [3] and verdict.codes_BW.tolist() == [[2, 1, 0, 0]]


def test_no_drafts_at_all() -> None:
    """A window of one position, and a row whose window is narrower than the pass: p, whatever lies there."""
    noise = Script([0.0], [0.9])
    verdict = RatioTest("fresh").judge(window(laws(P), [0], laws([1.0, 0.0, 0.0])), draws(noise, 1))
    assert verdict.kept_B.tolist() == [0] and verdict.codes_BW.tolist() == [[2]]
    noise = Script([0.0] * 4, [0.9] * 4)
    RatioTest("max").judge(window(FLAT_P, [0] * 4, FLAT_Q, drafted=1), draws(noise, 4))
    assert drawn_laws(noise) == [[1, 0, 0]] + [[0.2, 0.3, 0.5]] * 3


def test_rows_are_judged_by_themselves() -> None:
    noise = Script([0.4, 0.6, 0.1, 0.0], [0.9, 0.1, 0.45, 0.45])
    noise.accept = torch.tensor([[0.4, 0.6, 0.1, 0.0], [0.4, 0.4, 0.4, 0.0]])
    noise.pick = torch.tensor([[0.9, 0.1, 0.45, 0.45], [0.9] * 4])
    both = Window(*(torch.cat([part, part]) for part in window(FLAT_P, [0] * 4, FLAT_Q) if part is not None))
    request = replace(draws(noise, 4).request, seeds_B=torch.tensor([0, 1]))
    verdict = RatioTest("fresh").judge(both, Draws(request, torch.zeros(2, 4, dtype=torch.int64), 7))
    assert verdict.kept_B.tolist() == [1, 3]
    assert verdict.codes_BW.tolist() == [[0, 2, 1, 1], [0, 0, 0, 2]]


def test_exact_match_keeps_what_plain_decoding_draws() -> None:
    p = laws(*[P] * 5)
    for drafts, kept in (([0, 1, 2, 0, 1], 4), ([0, 1, 1, 0, 1], 2), ([1, 1, 2, 0, 1], 0)):
        noise = Script([], [0.4, 0.7, 0.9, 0.1, 0.6])       # codes 0 1 2 0 1
        verdict = ExactMatch().judge(window(p, drafts, None), draws(noise, 5))
        assert verdict.kept_B.tolist() == [kept]            # the last position is no draft, even if it is right
        assert verdict.codes_BW.tolist() == [[0, 1, 2, 0, 1]]
        assert list(noise.drawn) == [(Purpose.SAMPLE, 0)]


def test_noise_is_new_in_every_pass_or_shared_by_all() -> None:
    p = torch.full((1, 40, 8), 1 / 8)
    early, late = (Draws(replace(draws(CounterNoise(), 40).request), 10 + torch.arange(40)[None], turn)
                   for turn in (2, 3))
    half = torch.full((1, 40), 0.5)
    assert torch.equal(early.shared(p), late.shared(p))
    assert torch.equal(early.shared(p), CounterNoise().categorical(p, torch.tensor([0]), early.positions_BW))
    assert not torch.equal(early.fresh(p), late.fresh(p)) and not torch.equal(early.fresh(p), early.shared(p))
    assert not torch.equal(early.passes(half), late.passes(half))


@pytest.mark.parametrize("reach, spread, radius, group", [
    (7, 1.0, 1e9, [0, 1, 2, 3]), (0, 1.0, 1e9, [1]), (1, 1.0, 1e9, [0, 1, 2]), (7, 0.15, 1e9, [0, 1, 2]),
    (7, 0.12, 1e9, [1, 2]), (7, 1.0, 0.5, [1, 3]), (7, 0.0, 0.0, [1])])
def test_grouped_test_compares_the_mass_of_neighbours(reach: int, spread: float, radius: float, group: list[int]
                                                      ) -> None:
    """Ranks 0 1 2 3; differences from p(1) = 0.3: 0.13, 0, 0.1, 0.23; vectors 0, 3, 6 and 3.5 on a line."""
    p, q = [0.43, 0.3, 0.2, 0.07], [0.1, 0.2, 0.3, 0.4]
    space = SimpleNamespace(codebook_VC=torch.tensor([[0.0], [3.0], [6.0], [3.5]]))
    noise = Script([0.5, 0.5], [0.5, 0.5])
    GroupedRatioTest(reach, spread, radius).judge(window(laws(p, p), [1, 1], laws(q, q)), draws(noise, 2, space))
    expected = sum(p[code] for code in group) / sum(q[code] for code in group)
    assert float(noise.chances[0, 0]) == pytest.approx(expected)


def test_promises() -> None:
    assert ExactMatch().guarantee == "same-codes" and not ExactMatch().needs_law
    assert all(RatioTest(coupling).guarantee == "same-law" for coupling in ("fresh", "max", "gumbel"))
    assert GroupedRatioTest().guarantee == "none" and GroupedRatioTest().needs_law


def test_errors() -> None:
    with pytest.raises(UnknownNameError, match="maximal"):
        RatioTest("maximal")            # type: ignore[arg-type]
    with pytest.raises(InputError, match="radius -1"):
        GroupedRatioTest(radius=-1)
    with pytest.raises(InputError, match="use the decoder sjd"):
        GroupedRatioTest().judge(window(FLAT_P, [0] * 4, FLAT_Q), draws(Script([0.5] * 4, [0.5] * 4), 4))
