"""Widths of passes from histories written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from arimg.accel.jacobi import Jacobi, Scd
from arimg.accel.windows import (BUCKETS, WIDEST, AdaptiveWindow, FixedWindow, Pass, bucket, find_window, measured_cost,
                                 nominal_cost, survivals)
from arimg.errors import InputError


def flat(width: int) -> float:
    return 1.0


def steep(width: int) -> float:
    return float(width)


def test_buckets() -> None:
    assert [bucket(width) for width in (0, 1, 2, 3, 5, 16, 17, 256, 999)] == [1, 1, 2, 4, 8, 16, 32, 256, 256]


def test_fixed_window_ends_with_the_image() -> None:
    policy = FixedWindow(6)
    assert policy.widths([1, 50], [], 64) == [6, 6]
    assert policy.widths([60, 61, 62, 63, 64], [], 64) == [4, 4, 2, 1, 1]
    assert FixedWindow(3).widths([61], [], 64) == [3]


@pytest.mark.parametrize("policy", [FixedWindow(16), AdaptiveWindow(nominal_cost)], ids=["fixed", "adaptive"])
def test_no_row_depends_on_its_neighbours(policy: FixedWindow | AdaptiveWindow) -> None:
    together = [Pass([8, 8, 8], [3, 8, 1], 0.0), Pass([32, 32, 32], [9, 30, 1], 0.0)] * 4
    fixed = [49, 62, 9]
    alone = [policy.widths([fixed[row]], [Pass([one.widths[row]], [one.counts[row]], 0.0) for one in together], 64)[0]
             for row in range(3)]
    assert policy.widths(fixed, together, 64) == alone and alone[1] == 2


def test_survival_by_hand() -> None:
    """Passes of width 3 judge two drafts at most. Each chance is (held + the chance before) / (tried + 1)."""
    assert survivals([], 3) == [0.5, 0.25]
    assert survivals([(3, 1)], 3) == [0.25, 0.25 * 0.25]                       # the first draft failed
    assert survivals([(3, 2)], 3) == [0.75, 0.75 * 0.375]                      # the second failed
    assert survivals([(3, 3)], 3) == [0.75, 0.75 * 0.875]                      # both held
    assert survivals([(1, 1)], 3) == survivals([], 3)                          # no draft was judged
    assert survivals([(3, 3), (3, 1)], 2) == pytest.approx([(0.9 + 0.5) / 2.9])        # the older pass weighs 0.9


def history(width: int, count: int, passes: int = 8) -> list[Pass]:
    return [Pass([width], [count], 0.0)] * passes


def test_adaptive_window_first_tries_widths() -> None:
    policy = AdaptiveWindow(flat, trial=(8, 32, 4))
    assert [policy.widths([1], history(8, 8, done), 1000)[0] for done in (0, 1, 2)] == [8, 32, 4]


@pytest.mark.parametrize("cost, count, low, high", [
    (flat, 16, WIDEST, WIDEST),         # all drafts hold and width is free
    (steep, 1, 1, 1),                   # none holds and width is dear
    (nominal_cost, 1, 1, 8),
    (nominal_cost, 16, 32, WIDEST),
])
def test_adaptive_window_weighs_tokens_against_cost(cost: Callable[[int], float], count: int, low: int, high: int
                                                    ) -> None:
    (width,) = AdaptiveWindow(cost).widths([10], history(16, count), 1000)
    assert low <= width <= high and width in BUCKETS


def test_adaptive_window_ends_with_the_image() -> None:
    assert AdaptiveWindow(flat).widths([61, 63], [Pass([16, 16], [16, 16], 0.0)] * 8, 64) == [4, 1]
    assert max(AdaptiveWindow(flat, widest=4).widths([1], history(4, 4), 1000)) == 4


def test_measured_cost_is_a_line_through_medians() -> None:
    passes = [Pass([8], [1], seconds) for seconds in (1.0, 1.0, 9.0)] + [Pass([32, 8], [1, 1], 2.0)] * 2
    cost = measured_cost(passes)
    assert [cost(width) for width in (8, 20, 32, 56)] == pytest.approx([1.0, 1.5, 2.0, 3.0])
    falling = measured_cost([Pass([8], [1], 2.0)] * 2 + [Pass([32], [1], 1.0)] * 2)
    assert falling(1) == falling(64) == 2.0
    assert measured_cost([Pass([8], [1], 1.0)] * 9 + [Pass([32], [1], 1.0)]) is nominal_cost
    assert cost(1) > 0


def test_finding() -> None:
    own = FixedWindow(5)
    assert find_window(own, measured=True) is own and find_window(7, measured=True) == FixedWindow(7)
    assert find_window("auto", measured=False) == AdaptiveWindow(nominal_cost)


def test_only_codes_that_do_not_depend_on_widths_may_follow_the_clock() -> None:
    assert Jacobi().window == AdaptiveWindow(None)
    assert Scd("auto").window == AdaptiveWindow(nominal_cost)


@pytest.mark.parametrize("wrong", [0, -3])
def test_widths_below_one(wrong: int) -> None:
    with pytest.raises(InputError, match=f"--window {wrong}: .* whole number >= 1"):
        Jacobi(wrong)


def test_names_other_than_auto() -> None:
    with pytest.raises(InputError, match="--window wide: give a whole number >= 1, or auto"):
        Jacobi("wide")
