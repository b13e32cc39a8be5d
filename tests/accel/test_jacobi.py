"""The loop of the Speculative Jacobi family. What it draws is proven in tests/exactness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.acceptance import ExactMatch, RatioTest
from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, Guidance, OnStep, StepInfo
from arimg.accel.drafts import Blank
from arimg.accel.jacobi import Gsd, Jacobi, Scd, ScdGumbel, Sjd, SpeculativeJacobi
from arimg.accel.siblings import ScdSiblings
from arimg.accel.target import Target
from arimg.accel.windows import FixedWindow
from arimg.errors import InputError, UnknownNameError
from tests.exactness.toy import attentive_model, faint_inject
from tests.models.toy import toy_classes, toy_codes

LENGTH = 16
FAMILY: list[Callable[..., SpeculativeJacobi]] = [Jacobi, Sjd, Scd, ScdGumbel, ScdSiblings]


def decode(decoder: Decoder, batch: int = 3, on_step: OnStep | None = None, **changes: Any) -> DecodeResult:
    request = DecodeRequest(toy_classes(batch), (4, 4), torch.arange(batch), faint_inject(batch), **changes)
    return decoder.decode(Target(attentive_model(), request), request, on_step)


def codes_of(result: DecodeResult) -> Tensor:
    assert result.codes_BL is not None
    return result.codes_BL


@pytest.mark.parametrize("kind", FAMILY)
def test_forced_codes_are_kept_and_read(kind: Callable[..., SpeculativeJacobi]) -> None:
    forced = torch.full((3, LENGTH), -1)
    forced[0, :8] = toy_codes(1)[0, :8]
    forced[1, 0], forced[1, LENGTH - 1] = 3, 4
    codes, free = codes_of(decode(kind(4), forced_BL=forced)), codes_of(decode(kind(4)))
    assert torch.equal(codes[forced >= 0], forced[forced >= 0])
    assert torch.equal(codes[2], free[2]) and not torch.equal(codes[0, 8:], free[0, 8:])


@pytest.mark.parametrize("kind", FAMILY)
def test_everything_forced_takes_the_fewest_passes(kind: Callable[..., SpeculativeJacobi]) -> None:
    result = decode(kind(5), forced_BL=toy_codes(3))
    assert torch.equal(codes_of(result), toy_codes(3))
    assert result.stats.forward_passes == 1 + 3


@pytest.mark.parametrize("kind", FAMILY)
def test_a_window_of_one_takes_a_pass_for_every_code(kind: Callable[..., SpeculativeJacobi]) -> None:
    result = decode(kind(1))
    assert result.stats.forward_passes == LENGTH and result.stats.accepted_per_pass == (1.0,) * LENGTH
    assert result.stats.extra["fixed_at"] == [list(range(1, LENGTH + 1))] * 3


@pytest.mark.parametrize("kind", FAMILY)
def test_one_code_is_drawn_from_the_prefix(kind: Callable[..., SpeculativeJacobi]) -> None:
    request = DecodeRequest(toy_classes(3), (1, 1), torch.arange(3))
    results = [decoder.decode(Target(attentive_model(), request), request) for decoder in (kind(4), PlainAR())]
    assert torch.equal(codes_of(results[0]), codes_of(results[1]))
    assert results[0].stats.forward_passes == 1


def test_windows_wider_than_the_image() -> None:
    assert torch.equal(codes_of(decode(Jacobi(99))), codes_of(decode(PlainAR())))
    assert codes_of(decode(Scd(99))).shape == (3, LENGTH)


def test_external_drafts_come_before_the_initialisation() -> None:
    """And no initialisation is asked for more than the positions that are new."""
    right = codes_of(decode(PlainAR()))
    holes = right.clone()
    holes[:, 3::4] = -1

    class Seen:
        """Offers code 0 and notes where drafts were wanted."""

        def __init__(self) -> None:
            self.wanted = list[set[int]]()

        def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
            """See DraftInit."""
            new_BW = blank.positions_BW >= blank.known_B[:, None]
            self.wanted.append(set(blank.positions_BW[new_BW].tolist()))
            return torch.zeros_like(blank.positions_BW), None
    init = Seen()
    result = decode(Jacobi(4, init), draft_BL=holes)
    assert torch.equal(codes_of(result), right)
    assert init.wanted[0] == {1, 2, 3, 4}
    assert result.stats.forward_passes < decode(Jacobi(4, Seen())).stats.forward_passes
    assert decode(Jacobi(4, Seen()), draft_BL=right).stats.forward_passes == 1 + 4


def test_on_step_reports_every_pass() -> None:
    seen: list[StepInfo] = []
    shown: list[list[int]] = []

    def on_step(info: StepInfo) -> None:
        seen.append(info)
        shown.append(info.codes_BL[0].tolist())
    result = decode(Jacobi(4), on_step=on_step)
    codes, fixed_at = codes_of(result), result.stats.extra["fixed_at"]
    assert [info.forward_pass for info in seen] == list(range(1, result.stats.forward_passes + 1))
    assert [info.fixed_tokens for info in seen] == [
        sum(at <= info.forward_pass for row in fixed_at for at in row) for info in seen]
    assert {info.total_tokens for info in seen} == {3 * LENGTH} and seen[-1].fixed_tokens == 3 * LENGTH
    for number, codes_then in enumerate(shown, start=1):
        assert [code for code, at in zip(codes_then, fixed_at[0]) if at <= number] == \
            [code for code, at in zip(codes[0].tolist(), fixed_at[0]) if at <= number]


def test_statistics_say_what_a_row_did() -> None:
    stats = decode(Jacobi(4), batch=1).stats
    (fixed_at,) = stats.extra["fixed_at"]
    assert stats.accepted_per_pass == tuple(float(fixed_at.count(number))
                                            for number in range(1, stats.forward_passes + 1))
    assert max(stats.extra["widths"]) == 4 and len(stats.extra["widths"]) == stats.forward_passes - 1


@pytest.mark.parametrize("kind", FAMILY)
def test_every_token_says_when_it_was_fixed(kind: Callable[..., SpeculativeJacobi]) -> None:
    result = decode(kind(4), batch=40)
    for fixed_at in result.stats.extra["fixed_at"]:
        assert fixed_at[0] == 1 and all(0 <= later - at <= 1 for at, later in zip(fixed_at, fixed_at[1:]))
    assert max(map(max, result.stats.extra["fixed_at"])) == result.stats.forward_passes


def test_a_result_is_not_the_loops_own_tensor() -> None:
    assert codes_of(decode(Jacobi(4)))._base is None
    assert not codes_of(decode(Jacobi(4), guidance=Guidance(2.0))).requires_grad


def test_promises() -> None:
    assert [kind().guarantee for kind in FAMILY] == ["same-codes"] + ["same-law"] * 4
    assert Gsd().guarantee == "none"
    assert SpeculativeJacobi(ExactMatch(), 3, "table").guarantee == "same-codes"
    assert SpeculativeJacobi(RatioTest("max"), FixedWindow(3), "table").guarantee == "same-law"


def test_errors() -> None:
    with pytest.raises(InputError, match="--window 0"):
        Sjd(0)
    with pytest.raises(UnknownNameError, match="diagonal"):
        Scd(4, "diagonal")
    with pytest.raises(InputError, match="siblings is 0"):
        ScdSiblings(siblings=0)
