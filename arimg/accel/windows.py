"""How many positions a pass judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import median
from typing import Protocol

from arimg.errors import InputError

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)    # widths of passes, so that a compiled step sees few shapes
WIDEST = 64             # beyond it the embedded model and the toy of sjd.md section 6 gain next to nothing
MEMORY = 0.9            # weight of a pass in the estimates, relative to the one after it
REVISION = 0.3          # tokens per pass grow like W ** 0.3 at equal survival: drafts are revised more often
NOMINAL_COST = 1 / 24   # of one more position, relative to a pass over none: what small models take on two CPU cores


@dataclass(frozen=True)
class Pass:
    """What a policy may know of a pass: nothing of any code."""

    widths: list[int]       # per row, positions judged
    counts: list[int]       # per row, tokens fixed
    seconds: float


class WindowPolicy(Protocol):
    """A policy. It sees histories only, never a code, so that every acceptance rule keeps its law; and of each row its
    own alone, so that no picture depends on its neighbours."""

    @property
    def widest(self) -> int:
        """The largest width it will ask for."""

    def widths(self, fixed: Sequence[int], passes: Sequence[Pass], length: int) -> list[int]:
        """Positions to judge in each row, given how many of `length` are `fixed` and the passes so far."""


@dataclass(frozen=True)
class FixedWindow:
    """The same width in every pass, less at the end."""

    widest: int

    def __post_init__(self) -> None:
        if self.widest < 1:
            raise InputError(f"--window {self.widest}: a pass judges at least 1 position; give a whole number >= 1, "
                             "or auto")

    def widths(self, fixed: Sequence[int], passes: Sequence[Pass], length: int) -> list[int]:
        """See WindowPolicy."""
        return [min(self.widest, bucket(length - n)) for n in fixed]


@dataclass(frozen=True)
class AdaptiveWindow:
    """The width with the most tokens per unit of cost: E[tokens | W] / c(W) (SpecDec++ without its trained head, Huang
    et al. 2024, arXiv:2405.19715).

    E[tokens | W] comes from survival estimates S(j), the chance that j drafts in a row hold, of the row's own passes.
    `cost` maps W to c(W) on any scale; None = it is measured: a straight line through the seconds of the passes of this
    very run. Then widths differ from run to run, which only codes that do not depend on widths may allow.
    """

    cost: Callable[[int], float] | None = None
    widest: int = WIDEST
    trial: tuple[int, ...] = (8, 8, 32, 32, 8, 32, 16)      # widths of the first passes

    def widths(self, fixed: Sequence[int], passes: Sequence[Pass], length: int) -> list[int]:
        """See WindowPolicy."""
        if len(passes) < len(self.trial):
            wanted = [self.trial[len(passes)]] * len(fixed)
        else:
            cost = self.cost or measured_cost(passes)
            wanted = [self._best(row, passes, cost) for row in range(len(fixed))]
        return [min(self.widest, width, bucket(length - n)) for width, n in zip(wanted, fixed)]

    def _best(self, row: int, passes: Sequence[Pass], cost: Callable[[int], float]) -> int:
        last = passes[-1].widths[row]
        survival = survivals([(one.widths[row], one.counts[row]) for one in passes], self.widest)
        gains = {width: (1 + sum(survival[:width - 1])) * (width / last) ** REVISION / cost(width)
                 for width in BUCKETS if width <= self.widest}
        return max(gains, key=gains.__getitem__)


def survivals(passes: Sequence[tuple[int, int]], depth: int) -> list[float]:
    """S(1) .. S(depth - 1) from (width, tokens fixed) of passes, later ones weighing more.

    At each depth the chance to hold, given that all earlier drafts did, is estimated with one pseudo-observation of the
    depth before it.
    """
    tried, held = [0.0] * depth, [0.0] * depth
    for age, (width, count) in enumerate(reversed(passes)):
        for slot in range(min(count, width - 1, depth)):        # drafts judged: count - 1 held, the next one failed
            tried[slot] += MEMORY ** age
            held[slot] += MEMORY ** age if slot < count - 1 else 0.0
    chances, chance = [], 0.5
    for slot in range(depth - 1):
        chance = (held[slot] + chance) / (tried[slot] + 1)
        chances.append(chance)
    return list(accumulate(chances, mul))


def nominal_cost(width: int) -> float:
    """c(W) where nothing is measured."""
    return 1 + NOMINAL_COST * width


def measured_cost(passes: Sequence[Pass]) -> Callable[[int], float]:
    """c(W) = a + b W through the median seconds of the narrowest and the widest passes; flat or falling is flat."""
    seconds: dict[int, list[float]] = {}
    for one in passes:
        seconds.setdefault(max(one.widths), []).append(one.seconds)
    often = sorted(width for width, times in seconds.items() if len(times) >= 2)
    if len(often) < 2:
        return nominal_cost
    low, high = often[0], often[-1]
    at_low, at_high = median(seconds[low]), median(seconds[high])
    slope = max(0.0, (at_high - at_low) / (high - low))
    return lambda width: max(at_low + slope * (width - low), 0.1 * at_low)


def bucket(width: int) -> int:
    """The smallest of BUCKETS that holds `width`, or the largest."""
    return next((one for one in BUCKETS if one >= width), BUCKETS[-1])


def find_window(window: int | str | WindowPolicy, measured: bool) -> WindowPolicy:
    """A policy from what a caller gives; "auto" is AdaptiveWindow, with measured or nominal cost. Raises InputError."""
    if isinstance(window, str) and window != "auto":
        raise InputError(f"--window {window}: give a whole number >= 1, or auto")
    if isinstance(window, str):
        return AdaptiveWindow(None if measured else nominal_cost)
    return FixedWindow(window) if isinstance(window, int) else window
