"""Confidence intervals by the bootstrap (Efron 1979): the pictures that were measured are drawn again with replacement.

A distance between sets is larger on a resampled set, which holds fewer different pictures; so intervals are those of
the resampled values moved onto the value measured: value + (quantile - median).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

ROUNDS = 1000
LEVEL = 0.95
DRAWN_AT_ONCE = 1_000_000       # numbers: rounds times pictures


class Figure(NamedTuple):
    """A measured value and the interval that holds 95 % of its resampled values."""

    value: float
    low: float
    high: float


def draws(count: int, rounds: int = ROUNDS, seed: int = 0) -> Iterator[np.ndarray]:
    """counts_N int64 for each round: how often each of `count` pictures was drawn; they sum to `count`."""
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // count)
    for first in range(0, rounds, at_once):
        yield from generator.multinomial(count, np.full(count, 1 / count), size=min(at_once, rounds - first))


def figure(value: float, resampled: Iterable[float], lowest: float = -np.inf) -> Figure:
    """`value` with the interval of its resampled values about it, cut off below `lowest`; NaN without any."""
    values_R = np.fromiter(resampled, np.float64)
    if not len(values_R):
        return Figure(float(value), np.nan, np.nan)
    low, middle, high = np.quantile(values_R, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return Figure(float(value), float(np.maximum(lowest, value + low - middle)), float(value + high - middle))


def mean_figure(values_N: np.ndarray, seed: int = 0) -> Figure:
    """The mean of one value per picture; NaN = the picture has none and is left out."""
    values_N = np.asarray(values_N, np.float64)
    values_N = values_N[~np.isnan(values_N)]
    if not len(values_N):
        return Figure(np.nan, np.nan, np.nan)
    count = len(values_N)
    return figure(values_N.mean(), (counts_N @ values_N / count for counts_N in draws(count, seed=seed)))
