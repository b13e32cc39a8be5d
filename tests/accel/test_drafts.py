"""First drafts on boards written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.accel.drafts import INITS, Blank, RandomCodes, find_init
from arimg.errors import UnknownNameError
from arimg.models.base import Condition
from arimg.noise import CounterNoise, Purpose

LAW = [0.0, 0.1, 0.0, 0.9, 0.0]


def blank(known: list[int], width: int, grid: tuple[int, int] = (4, 3), codes: list[int] | None = None) -> Blank:
    """Codes by position, the same in every row; wanted are `width` positions, from one below the first unknown on."""
    length = grid[0] * grid[1]
    codes = list(range(10, 10 + length)) if codes is None else codes
    known_B, padded = torch.tensor(known), codes + [99] * (length + 8 - len(codes))
    request = DecodeRequest(Condition(class_ids_B=torch.zeros(len(known), dtype=torch.int64)), grid,
                            torch.arange(len(known)))
    return Blank(request, torch.tensor([padded] * len(known)), known_B, known_B[:, None] - 1 + torch.arange(width),
                 torch.tensor([LAW] * len(known)))


def wanted(init: str, board: Blank) -> list[list[int]]:
    """The codes from the first unknown position on; these schemes record certainty."""
    codes_BW, law_BWV = find_init(init).fill(board)
    assert law_BWV is None
    return codes_BW[:, 1:].tolist()


def test_repeat_left_is_the_last_known_code() -> None:
    assert wanted("repeat-left", blank([5, 1], 4)) == [[14, 14, 14], [10, 10, 10]]


def test_repeat_up_is_the_code_above() -> None:
    assert wanted("repeat-up", blank([3], 4)) == [[10, 11, 12]]
    assert wanted("repeat-up", blank([7], 3)) == [[14, 15]]


def test_repeat_up_in_the_first_row_repeats_left() -> None:
    assert wanted("repeat-up", blank([1], 3)) == [[10, 10]]
    assert wanted("repeat-up", blank([2], 4)) == [[11, 10, 11]]         # position 2; then 3 and 4 lie below 0 and 1


def test_repeat_up_takes_the_lowest_known_row_when_the_window_is_wider_than_the_grid() -> None:
    assert wanted("repeat-up", blank([4], 9)) == [[11, 12, 13] * 2 + [11, 12]]
    assert wanted("repeat-up", blank([3], 8, grid=(9, 1))) == [[12] * 7]


def test_rows_have_their_own_places() -> None:
    assert wanted("repeat-up", blank([3, 7, 1], 3)) == [[10, 11], [14, 15], [10, 10]]


def test_table_takes_what_last_stood_below_the_code_above() -> None:
    # 1 2 1 / 5 6 7 / 1 3 2 / ? ? ?: below 1 stood 5, 7 and nothing yet; below 3 nothing; below 2 stood 6.
    assert wanted("table", blank([9], 4, codes=[1, 2, 1, 5, 6, 7, 1, 3, 2])) == [[7, 3, 6]]
    # The row itself counts as soon as it is known: below the lower 1 stands 4.
    assert wanted("table", blank([10], 3, codes=[1, 2, 1, 5, 6, 7, 1, 1, 2, 4])) == [[4, 6]]


def test_table_knows_nothing_in_the_first_row() -> None:
    assert wanted("table", blank([1], 4)) == [[10, 10, 10]]
    assert wanted("table", blank([3], 4, codes=[1, 1, 1])) == [[1, 1, 1]]


def test_table_does_not_look_at_unknown_positions() -> None:
    codes = [1, 2, 1, 5, 6, 7, 1, 3, 2]
    assert wanted("table", blank([7], 3, codes=codes)) == wanted("table", blank([7], 3, codes=codes[:7])) == [[6, 7]]


def test_random_codes_are_uniform_and_their_law_is_recorded_on_demand() -> None:
    board = blank([1] * 500, 8)
    codes, law = find_init("uniform-law").fill(board)
    assert law is not None and bool((law == 0.2).all()) and law.shape == (500, 8, 5)
    again, none = find_init("random").fill(board)
    assert torch.equal(codes, again) and none is None
    share = torch.bincount(codes.flatten(), minlength=5) / codes.numel()
    assert bool(((share - 0.2).abs() < 0.03).all())
    expected = CounterNoise().categorical(law, board.request.seeds_B, board.positions_BW, Purpose.DRAFT)
    assert torch.equal(codes, expected)


def test_left_law_draws_with_the_noise_of_plain_decoding() -> None:
    board = blank([1] * 300, 8)
    codes, law = find_init("carry-law").fill(board)
    assert law is not None and bool((law == torch.tensor(LAW)).all()) and law.shape == (300, 8, 5)
    assert torch.equal(codes, CounterNoise().categorical(law, board.request.seeds_B, board.positions_BW))
    assert set(codes.flatten().tolist()) == {1, 3}
    again, none = find_init("sample-left").fill(board)
    assert torch.equal(codes, again) and none is None


@pytest.mark.parametrize("name", INITS)
def test_a_draft_does_not_depend_on_the_neighbours(name: str) -> None:
    def drafts(known: list[int]) -> Tensor:
        return find_init(name).fill(blank(known, 6, codes=[1, 2, 1, 2, 3, 4, 1, 3, 2]))[0]
    assert torch.equal(drafts([4, 7])[:1], drafts([4])) and torch.equal(drafts([4, 7]), drafts([4, 7, 2])[:2])


def test_finding() -> None:
    own = RandomCodes()
    assert find_init(own) is own and find_init("table") is INITS["table"]
    with pytest.raises(UnknownNameError, match="repeat-upp.*repeat-up"):
        find_init("repeat-upp")
